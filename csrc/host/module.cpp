// tokcore._host: what takes no tensors. NumPy arrays in and out; the interpreter runs on meanwhile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <thread>

#include "host/ter.h"

namespace tokcore {
namespace {

namespace py = pybind11;
using Integers = py::array_t<int64_t, py::array::c_style>;

void check(bool ok, const std::string& text) {
  if (!ok) throw py::value_error("ter: " + text);
}

void check_flat(const char* name, const Integers& array) {
  check(array.ndim() == 1,
        std::string(name) + " must have one dimension, got " + std::to_string(array.ndim()));
}

// The bounds of consecutive parts: they rise from 0 to `end`.
void check_offsets(const char* name, const Integers& offsets, int64_t end) {
  check_flat(name, offsets);
  check(offsets.size() > 0 && offsets.at(0) == 0 && offsets.at(offsets.size() - 1) == end,
        std::string(name) + " must run from 0 to " + std::to_string(end));
  for (py::ssize_t i = 1; i < offsets.size(); ++i)
    check(offsets.at(i) >= offsets.at(i - 1), std::string(name) + " must not fall, got " +
                                                  std::to_string(offsets.at(i)) + " after " +
                                                  std::to_string(offsets.at(i - 1)));
}

std::vector<Words> sentences(const Integers& ids, const Integers& offsets) {
  std::vector<Words> result(offsets.size() - 1);
  for (size_t i = 0; i < result.size(); ++i)
    result[i] = {ids.data() + offsets.at(i), offsets.at(i + 1) - offsets.at(i)};
  return result;
}

// The parts that `part` takes from the results, one after the other, and their bounds.
template <typename T, typename Part>
py::tuple concatenated(const std::vector<TerResult>& results, const Part& part) {
  py::array_t<int64_t> offsets(py::ssize_t(results.size()) + 1);
  int64_t* bounds = offsets.mutable_data();
  bounds[0] = 0;
  for (size_t i = 0; i < results.size(); ++i)
    bounds[i + 1] = bounds[i] + int64_t(part(results[i]).size());
  py::array_t<T> values(bounds[results.size()]);
  T* to = values.mutable_data();
  for (const TerResult& result : results)
    for (const T value : part(result)) *to++ = value;
  return py::make_tuple(values, offsets);
}

py::dict ter(const Integers& hypothesis, const Integers& hypothesis_offsets,
             const Integers& reference, const Integers& reference_offsets,
             const Integers& pair_offsets, int64_t max_shift_distance, int64_t beam,
             int64_t threads) {
  check_flat("hypothesis", hypothesis);
  check_flat("reference", reference);
  check_offsets("hypothesis_offsets", hypothesis_offsets, hypothesis.size());
  check_offsets("reference_offsets", reference_offsets, reference.size());
  check_offsets("pair_offsets", pair_offsets, reference_offsets.size() - 1);
  check(pair_offsets.size() == hypothesis_offsets.size(),
        "pair_offsets must be as many as hypothesis_offsets, got " +
            std::to_string(pair_offsets.size()) + " and " +
            std::to_string(hypothesis_offsets.size()));
  const std::vector<Words> hypotheses = sentences(hypothesis, hypothesis_offsets);
  const std::vector<Words> references = sentences(reference, reference_offsets);
  std::vector<TerPair> pairs(hypotheses.size());
  for (size_t i = 0; i < pairs.size(); ++i) {
    pairs[i] = {hypotheses[i], references.data() + pair_offsets.at(i),
                references.data() + pair_offsets.at(i + 1)};
    check(pairs[i].first < pairs[i].last,
          "pair_offsets must give every pair a reference, got none for pair " + std::to_string(i));
  }
  if (threads <= 0) threads = int64_t(std::thread::hardware_concurrency());
  std::vector<TerResult> results;
  {
    const py::gil_scoped_release released;
    results = translation_edit_rates(pairs, {max_shift_distance, beam}, threads);
  }
  py::array_t<int64_t> edits(py::ssize_t(results.size())), chosen(py::ssize_t(results.size()));
  for (size_t i = 0; i < results.size(); ++i) {
    edits.mutable_at(i) = results[i].edits;
    chosen.mutable_at(i) = results[i].reference;
  }
  py::dict out;
  out["edits"] = edits;
  out["reference"] = chosen;
  out["order"] = concatenated<int64_t>(
      results, [](const TerResult& r) -> const std::vector<int64_t>& { return r.order; });
  out["operations"] = concatenated<int8_t>(
      results, [](const TerResult& r) -> const std::vector<int8_t>& { return r.operations; });
  out["shifts"] = concatenated<int64_t>(results, [](const TerResult& r) {
    std::vector<int64_t> flat;
    for (const TerShift& s : r.shifts)
      flat.insert(flat.end(), {s.start, s.end, s.reference, s.target});
    return flat;
  });
  return out;
}

}  // namespace
}  // namespace tokcore

PYBIND11_MODULE(_host, m) {
  m.doc() = "Computations of tokcore that take no tensors.";
  m.def(
      "ter", &tokcore::ter, pybind11::kw_only(), pybind11::arg("hypothesis"),
      pybind11::arg("hypothesis_offsets"), pybind11::arg("reference"),
      pybind11::arg("reference_offsets"), pybind11::arg("pair_offsets"),
      pybind11::arg("max_shift_distance"), pybind11::arg("beam"), pybind11::arg("threads"),
      "Translation edit rates of sentences of integers, one after the other in flat arrays whose\n"
      "bounds are the offsets; references [pair_offsets[i], pair_offsets[i + 1]) are pair i's.\n"
      "What tokcore.text.ter computes with. beam < 0: none; threads <= 0: one a processor.");
}
