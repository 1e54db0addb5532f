// Every operator schema of tokcore: the table of contents. Nothing else lives here.
//
// Letters: N rows = the product of the leading dimensions "(...)", V vocabulary, K gathered targets
// a row. Statistics are float32 (float64 for double logits). An output that was not asked for has
// shape (0,). `row_temperature` (...) float32 overrides `temperature`; `softcap` 0 means none.
// Compiled once per library: tokcore and tokcore_emulated.
#include <torch/csrc/stable/library.h>

#include "common/namespace.h"

STABLE_TORCH_LIBRARY(TOKCORE_NAMESPACE, m) {
  // token_logprob: log p(target) per row of logits (..., V), target (...) or (..., K), and the
  // entropy (...), from one read. stats (..., 2) = row maximum (softcapped, before temperature) and
  // log-sum, all that the backward needs beside the logits.
  m.def(
      "token_logprob(Tensor logits, Tensor target, Tensor? row_temperature, float temperature, "
      "float softcap, "
      "int ignore_index, bool with_entropy, bool inplace_backward) -> (Tensor logprob, Tensor "
      "entropy, Tensor stats)");
  m.def(
      "token_logprob_backward(Tensor? grad_logprob, Tensor? grad_entropy, Tensor logits, Tensor "
      "target, Tensor entropy, "
      "Tensor stats, Tensor? row_temperature, float temperature, float softcap, int ignore_index) "
      "-> Tensor");
  // The same, written over the logits.
  m.def(
      "token_logprob_backward_(Tensor? grad_logprob, Tensor? grad_entropy, Tensor(a!) logits, "
      "Tensor target, "
      "Tensor entropy, Tensor stats, Tensor? row_temperature, float temperature, float softcap, "
      "int ignore_index) -> ()");

  // sequential_kl: per-row KL(reference || policy) (direction bit 1) and KL(policy || reference)
  // (bit 2), both log p(target) and the policy's entropy, from one read of both logits (..., V).
  // stats (..., 4) = policy max, log-sum, reference max, log-sum.
  m.def(
      "sequential_kl(Tensor policy_logits, Tensor reference_logits, Tensor? target, Tensor? mask, "
      "Tensor? row_temperature, float temperature, int ignore_index, int direction, bool "
      "with_entropy, "
      "bool inplace_backward) -> (Tensor kl, Tensor reverse_kl, Tensor policy_logprob, Tensor "
      "reference_logprob, "
      "Tensor entropy, Tensor stats)");
  m.def(
      "sequential_kl_backward(Tensor? grad_kl, Tensor? grad_reverse_kl, Tensor? "
      "grad_policy_logprob, "
      "Tensor? grad_reference_logprob, Tensor? grad_entropy, Tensor policy_logits, Tensor "
      "reference_logits, "
      "Tensor? target, Tensor? mask, Tensor kl, Tensor reverse_kl, Tensor entropy, Tensor stats, "
      "Tensor? row_temperature, float temperature, int ignore_index, bool policy_needs_grad, "
      "bool reference_needs_grad) -> (Tensor grad_policy, Tensor grad_reference)");
  // The policy's gradient alone, written over the policy logits.
  m.def(
      "sequential_kl_backward_(Tensor? grad_kl, Tensor? grad_reverse_kl, Tensor? "
      "grad_policy_logprob, "
      "Tensor? grad_reference_logprob, Tensor? grad_entropy, Tensor(a!) policy_logits, Tensor "
      "reference_logits, "
      "Tensor? target, Tensor? mask, Tensor kl, Tensor reverse_kl, Tensor entropy, Tensor stats, "
      "Tensor? row_temperature, float temperature, int ignore_index) -> ()");

  // policy_loss: the loss () of tokens (B, T), or (total,) packed with cu_seqlens (B + 1,), under
  // the rules that follow, with metrics (10,), and its gradients by logprob and entropy but for the
  // two factors `scales` (2,), which are known only when all rows are. Numbers of the rules:
  // common/policy.h; infinity is no bound.
  m.def(
      "policy_loss(Tensor logprob, Tensor advantages, Tensor? old_logprob, Tensor? "
      "reference_logprob, Tensor? sampler_logprob, Tensor? importance_ratio, Tensor? entropy, "
      "Tensor? mask, Tensor? cu_seqlens, Tensor? entropy_threshold, Tensor? normalizer, "
      "int surrogate, int level, int kl, int aggregation, int importance, bool mask_importance, "
      "bool row_advantages, bool corrected_kl, bool count_empty, bool trl_padding, "
      "float parameter0, float parameter1, float parameter2, float parameter3, "
      "float log_ratio_limit, float kl_coefficient, float kl_log_limit, float kl_limit, "
      "float off_policy_threshold, float least_importance, float most_importance, "
      "float entropy_coefficient, float accumulation, float length, bool logprob_needs_grad, "
      "bool entropy_needs_grad) -> (Tensor loss, Tensor metrics, Tensor logprob_gradient, "
      "Tensor entropy_gradient, Tensor scales)");
  // logprob is there to be known as what the gradient depends on: a second derivative is refused.
  m.def(
      "policy_loss_backward(Tensor grad_loss, Tensor logprob, Tensor logprob_gradient, "
      "Tensor entropy_gradient, Tensor scales) -> (Tensor grad_logprob, Tensor grad_entropy)");

  // group_advantage: each reward (B,) against the rewards of its group: runs of equal `group` (B,)
  // in the order `order` (B,), or `group_size` rows in a row. Numbers of the rules:
  // common/advantage.h. mean and deviation (B,) of each row's group on request.
  m.def(
      "group_advantage(Tensor rewards, Tensor? group, Tensor? order, Tensor? weights, "
      "int group_size, int center, int scale, int ddof, int singleton, float eps, bool contiguous, "
      "bool with_statistics) -> (Tensor advantage, Tensor mean, Tensor deviation)");

  // Paths through matrices (B, M, L) of unequal sizes, row_lengths and column_lengths (B,); sums
  // are float64 where `wide`. Ties and outputs: common/lattice.h and the headers of each name.
  // dtw: cost (B,) of the cheapest path of steps (1, 1), (1, 0), (0, 1); path (B, M + L - 1, 2),
  // path_length (B,).
  m.def(
      "dtw(Tensor cost, Tensor? row_lengths, Tensor? column_lengths, bool wide) -> (Tensor "
      "total, Tensor path, Tensor path_length)");
  // monotonic_search: score (B,) of the best path with one row a column, the same as before or the
  // next; rows (B, L), durations (B, M).
  m.def(
      "monotonic_search(Tensor scores, Tensor? row_lengths, Tensor? column_lengths, bool wide) -> "
      "(Tensor score, Tensor rows, Tensor durations)");
  // monotonic_align: score (B,) of the best partition into groups of one row with several columns
  // or one column with several rows; groups (B, M + L - 1, 4), group_count (B,), the columns of
  // each row (B, M, 2) and the rows of each column (B, L, 2). common/monotonic_align.h.
  m.def(
      "monotonic_align(Tensor scores, Tensor? row_lengths, Tensor? column_lengths, float "
      "length_penalty, bool wide) -> (Tensor score, Tensor groups, Tensor group_count, Tensor "
      "row_ranges, Tensor column_ranges)");
  // segment_attention: attention of queries (B, H, T, D) to the keys (B, H, S, D) of equal segment.
  // With words also the constraint (B, T) on the mean of the heads' weights; that mean, weights (B,
  // T, S), on request. stats (B, H, T, 2) = maximum of the scores, inverse sum of exponentials.
  m.def(
      "segment_attention(Tensor query, Tensor key, Tensor value, Tensor query_segments, "
      "Tensor key_segments, Tensor? query_words, Tensor? key_words, float scale, "
      "bool with_weights) -> (Tensor output, Tensor constraint, Tensor weights, Tensor stats)");
  m.def(
      "segment_attention_backward(Tensor grad_output, Tensor? grad_constraint, Tensor query, "
      "Tensor key, Tensor value, Tensor query_segments, Tensor key_segments, Tensor? query_words, "
      "Tensor? key_words, Tensor stats, float scale) -> (Tensor grad_query, Tensor grad_key, "
      "Tensor grad_value)");
  // sparse_window_attention: causal attention of queries (B, Hq, T, D), the last T of S positions,
  // to keys (B, Hkv, S, D) of the last `window` positions and, before those, to the positions
  // listed in global_index (B, Hg, M) int32. lse (B, Hq, T) = log of the sum of exponentials.
  m.def(
      "sparse_window_attention(Tensor query, Tensor key, Tensor value, Tensor? global_index, "
      "SymInt window, float scale) -> (Tensor output, Tensor lse)");
  m.def(
      "sparse_window_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor "
      "value, Tensor? global_index, Tensor lse, SymInt window, float scale) -> (Tensor grad_query, "
      "Tensor grad_key, Tensor grad_value)");
  // sparse_decode_attention: attention of one query a head (B, Hq, D) to the slots of a cache (B,
  // Hkv, C, D) that index (B, Hs, M), the first count (B, Hs) of it, lists, Hs = 1 or Hkv; without
  // index, to the first count slots. weight_row (B, Hs, M): the weights summed over the heads that
  // share the list; lse (B, Hq). A uint8 cache has (scale, offset) (B, Hkv, C, Z, 2).
  m.def(
      "sparse_decode_attention(Tensor query, Tensor key, Tensor value, Tensor? index, Tensor "
      "count, Tensor? key_quantization, Tensor? value_quantization, float scale) -> (Tensor "
      "output, Tensor weight_row, Tensor lse)");
  // prompt_window_scores: the weights (B, Hs, Q, C) that the queries (B, Hq, Q, D) of the last Q
  // tokens give to the slots, summed over the heads that share a list; query i sees count - (Q - 1
  // - i) slots.
  m.def(
      "prompt_window_scores(Tensor query, Tensor key, Tensor count, Tensor? key_quantization, "
      "float scale) -> Tensor");
  // edit_align: the fewest edits that turn hypothesis (..., H) into reference (..., R), integers of
  // which lengths (...) count, ties as in tercom. distance, count (...) int32; operations
  // (..., H + R) and tags (..., H) int8: 0 match, 1 substitution, 2 insertion, 3 deletion;
  // gap_counts (..., H + 1) int32: deletions before each token and at the end. Padding is -1.
  m.def(
      "edit_align(Tensor hypothesis, Tensor reference, Tensor? hypothesis_lengths, "
      "Tensor? reference_lengths) -> (Tensor distance, Tensor operations, Tensor count, "
      "Tensor hypothesis_tags, Tensor gap_counts)");
  // The sparse key-value cache of a layer (common/kv_state.h): B rows, Hkv heads, Hs = 1 or Hkv
  // lists of slots, C slots of which count (B, Hs) are in use, a ring of R rows of weights.
  // window_scores_update: rows (B, Hs, Q, M) of the weights of Q steps, up to step (B,), enter the
  // sums; those before the last `window` (B,) steps leave them.
  m.def(
      "window_scores_update(Tensor(a!) score, Tensor(b!) ring, Tensor(c!) last_selected, "
      "Tensor(d!) oldest, Tensor rows, Tensor? index, Tensor count, Tensor step, Tensor window) "
      "-> ()");
  // window_select: index (B, Hs, size) int32 of the last `local` (B,), the first `sinks` and
  // between them the `top` (B,) slots of the greatest score, ascending; selected (B, Hs).
  m.def(
      "window_select(Tensor score, Tensor count, Tensor local, Tensor top, SymInt size, "
      "SymInt sinks) -> (Tensor index, Tensor selected)");
  // kv_append: the last `valid` (B,) of Q tokens (B, Hkv, Q, D) go behind the slots in use, at
  // positions from `length` (B,) on, quantised where the keys are uint8.
  m.def(
      "kv_append(Tensor(a!) key, Tensor(b!) value, Tensor(c!) position, Tensor(d!) last_selected, "
      "Tensor(e!) count, Tensor new_key, Tensor new_value, Tensor length, Tensor valid, "
      "Tensor(f!)? key_quantization, Tensor(g!)? value_quantization) -> ()");
  // kv_compact: keeps what was selected at step `since` (B,) or later, the last `local` (B,) and
  // the first `sinks` slots in use, moved together.
  m.def(
      "kv_compact(Tensor(a!) key, Tensor(b!) value, Tensor(c!) position, Tensor(d!) score, "
      "Tensor(e!) ring, Tensor(f!) last_selected, Tensor(g!) count, Tensor since, Tensor local, "
      "SymInt sinks, Tensor(h!)? key_quantization, Tensor(i!)? value_quantization) -> ()");
}
