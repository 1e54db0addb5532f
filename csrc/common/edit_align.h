// The alignment of two sequences by the fewest edits, 32 or 64 cells an instruction.
//
// S[i][j] is the fewest edits between the first i tokens of the reference and the first j of the
// hypothesis. Neighbours differ by -1, 0 or 1, so a column is two words of bits for every 32 or 64
// rows (G. Myers, J. ACM 46, 1999; H. Hyyrö, Nordic J. Computing 10, 2003). Two bits of each cell
// are kept and say where it comes from, in this order:
//   diagonal    a match, which never costs more than its alternatives, or S[i-1][j-1] + 1: the
//               tokens are aligned
//   horizontal  S[i][j-1] + 1: the hypothesis has a token too many
//   neither     S[i-1][j] + 1: a token of the reference is missing
// The first that holds is the tie rule of tercom, so its back-trace reads these bits and nothing
// else.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TOKCORE_EDIT_HD __host__ __device__ __forceinline__
#else
#define TOKCORE_EDIT_HD inline __attribute__((always_inline))
#endif

namespace tokcore {
namespace {

// As they are numbered in outputs.
constexpr int kMatch = 0, kSubstitution = 1, kInsertion = 2, kDeletion = 3;

template <typename word_t>
constexpr int kEditBits = 8 * sizeof(word_t);

template <typename word_t>
TOKCORE_EDIT_HD int64_t edit_words(int64_t rows) {
  return (rows + kEditBits<word_t> - 1) / kEditBits<word_t>;
}

// S[i][j] - S[i-1][j] = 1, and = -1, for the rows of a word. As it is constructed: column 0.
template <typename word_t>
struct EditColumn {
  word_t positive = ~word_t(0), negative = 0;
};

template <typename word_t>
struct EditCells {
  word_t diagonal, horizontal;

  // The operation that leads to the cell of row `bit`, whose tokens are equal or not.
  TOKCORE_EDIT_HD int operation(int bit, bool equal) const {
    if (diagonal >> bit & 1) return equal ? kMatch : kSubstitution;
    return horizontal >> bit & 1 ? kInsertion : kDeletion;
  }
};

// From column j-1 to column j. Bits of `equal`: the row's token is the hypothesis' token j. `carry`
// is S[i][j] - S[i][j-1] in the row above the word, and becomes that of its last row; `last` names
// another row for that.
template <typename word_t>
TOKCORE_EDIT_HD EditCells<word_t> edit_step(word_t equal, EditColumn<word_t>& column, int& carry,
                                            int last = kEditBits<word_t> - 1) {
  const word_t positive = column.positive, negative = column.negative;
  const word_t lower = equal | word_t(carry < 0);
  // S[i][j] = S[i-1][j-1]: runs of them are the carries of an addition.
  const word_t same = (((lower & positive) + positive) ^ positive) | lower | negative;
  const word_t rises = negative | ~(same | positive), falls = same & positive;
  const word_t risen = rises << 1 | word_t(carry > 0), fallen = falls << 1 | word_t(carry < 0);
  column.positive = fallen | ~(same | risen);
  column.negative = same & risen;
  carry = int(rises >> last & 1) - int(falls >> last & 1);
  return {word_t(equal | ~same), rises};
}

}  // namespace
}  // namespace tokcore
