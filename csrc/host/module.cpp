// tokcore._host: what takes no tensors. The interpreter runs on meanwhile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <chrono>
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

// The bounds of consecutive parts: they rise from `begin` to `end`.
void check_offsets(const char* name, const Integers& offsets, int64_t begin, int64_t end) {
  check_flat(name, offsets);
  check(
      offsets.size() > 0 && offsets.at(0) == begin && offsets.at(offsets.size() - 1) == end,
      std::string(name) + " must run from " + std::to_string(begin) + " to " + std::to_string(end));
  for (py::ssize_t i = 1; i < offsets.size(); ++i)
    check(offsets.at(i) >= offsets.at(i - 1), std::string(name) + " must not fall, got " +
                                                  std::to_string(offsets.at(i)) + " after " +
                                                  std::to_string(offsets.at(i - 1)));
}

template <typename T, typename Part>
py::array_t<T> array_of(const std::vector<TerResult>& results, const Part& part) {
  py::array_t<T> values(py::ssize_t(results.size()));
  T* to = values.mutable_data();
  for (const TerResult& result : results) *to++ = part(result);
  return values;
}

template <typename Values, typename Convert>
py::list list_of(const Values& values, const Convert& convert) {
  py::list list(values.size());
  for (size_t i = 0; i < values.size(); ++i) list[i] = convert(values[i]);
  return list;
}

py::dict as_python(const std::vector<TerResult>& results, bool only_numbers) {
  py::dict out;
  out["edits"] = array_of<int64_t>(results, [](const TerResult& r) { return r.edits; });
  out["reference"] = array_of<int64_t>(results, [](const TerResult& r) { return r.reference; });
  out["reference_length"] =
      array_of<double>(results, [](const TerResult& r) { return r.reference_length; });
  if (only_numbers) return out;
  const py::str tags[] = {"OK", "BAD"};
  const auto tag = [&](char wrong) { return tags[int(wrong)]; };
  out["shifts"] = list_of(results, [](const TerResult& r) {
    return list_of(r.shifts, [](const TerShift& s) {
      return py::make_tuple(s.start, s.end, s.reference, s.target);
    });
  });
  out["permutation"] = list_of(results, [](const TerResult& r) {
    return py::array_t<int64_t>(py::ssize_t(r.order.size()), r.order.data());
  });
  out["alignment"] = list_of(results, [](const TerResult& r) {
    std::string letters;
    for (const int8_t operation : r.operations) letters += " SID"[operation];
    return py::str(letters);
  });
  out["word_tags"] =
      list_of(results, [&](const TerResult& r) { return list_of(r.wrong_words, tag); });
  out["gap_tags"] =
      list_of(results, [&](const TerResult& r) { return list_of(r.wrong_gaps, tag); });
  return out;
}

// Raises what a signal does, a KeyboardInterrupt say, but asks for one seldom: another thread of
// Python may hold the interpreter.
class Signals {
 public:
  void operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now < next_) return;
    const py::gil_scoped_acquire acquired;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    next_ = now + kBetween;
  }

 private:
  static constexpr std::chrono::milliseconds kBetween{100};
  std::chrono::steady_clock::time_point next_ = std::chrono::steady_clock::now() + kBetween;
};

py::dict ter(const Integers& words, const Integers& written, const Integers& sentence_offsets,
             const Integers& reference_offsets, int64_t max_shift_distance, int64_t beam,
             bool end_of_sentence, bool only_numbers, int64_t threads) {
  check_flat("words", words);
  check_flat("written", written);
  check(written.size() == words.size(), "written must be as many as words, " +
                                            std::to_string(words.size()) + ", got " +
                                            std::to_string(written.size()));
  check_offsets("sentence_offsets", sentence_offsets, 0, words.size());
  check_offsets("reference_offsets", reference_offsets, reference_offsets.size() - 1,
                sentence_offsets.size() - 1);
  std::vector<Words> sentences(sentence_offsets.size() - 1);
  for (size_t i = 0; i < sentences.size(); ++i) {
    const int64_t begin = sentence_offsets.at(i);
    sentences[i] = {words.data() + begin, written.data() + begin,
                    sentence_offsets.at(i + 1) - begin};
  }
  std::vector<TerPair> pairs(reference_offsets.size() - 1);
  for (size_t i = 0; i < pairs.size(); ++i) {
    pairs[i] = {sentences[i], sentences.data() + reference_offsets.at(i),
                sentences.data() + reference_offsets.at(i + 1)};
    check(pairs[i].first < pairs[i].last,
          "reference_offsets must give every pair a reference, got none for " + std::to_string(i));
  }
  if (threads <= 0) threads = int64_t(std::thread::hardware_concurrency());
  std::vector<TerResult> results;
  {
    const py::gil_scoped_release released;
    results = translation_edit_rates(pairs, {max_shift_distance, beam, end_of_sentence}, threads,
                                     Signals());
  }
  return as_python(results, only_numbers);
}

}  // namespace
}  // namespace tokcore

PYBIND11_MODULE(_host, m) {
  m.doc() = "Computations of tokcore that take no tensors.";
  m.def("ter", &tokcore::ter, pybind11::kw_only(), pybind11::arg("words"), pybind11::arg("written"),
        pybind11::arg("sentence_offsets"), pybind11::arg("reference_offsets"),
        pybind11::arg("max_shift_distance"), pybind11::arg("beam"),
        pybind11::arg("end_of_sentence"), pybind11::arg("only_numbers"), pybind11::arg("threads"),
        "The fields of tokcore.text.TER but for the score. Sentences stand one after the other,\n"
        "with sentence_offsets for bounds: sentence i is the hypothesis of pair i, its references\n"
        "are the sentences [reference_offsets[i], reference_offsets[i + 1]). Words are compared\n"
        "as in words, and aligned ones as in written once more, for tags. only_numbers: no more\n"
        "than the edits, the reference and its length. beam < 0: none; threads <= 0: one a\n"
        "processor.");
}
