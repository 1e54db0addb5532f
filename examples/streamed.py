"""Text as it is generated, with what each token takes and what the cache holds."""

import sys
import time

import transformers


def stream(model, tokenizer, inputs, cache, new_tokens):
    """Prints the greedy continuation as it comes; returns its figures."""
    figures = Figures(tokenizer, cache)
    model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=figures,
    )
    return figures


class Figures(transformers.TextStreamer):
    """Streams the text; str() of it says the rest."""

    def __init__(self, tokenizer, cache):
        super().__init__(tokenizer, skip_prompt=True)
        self.cache, self.times, self.peak = cache, [], 0

    def put(self, value):
        super().put(value)
        self.times.append(time.perf_counter())
        self.peak = max(self.peak, self.cache.nbytes)
        if sys.stderr.isatty() and len(self.times) > 1:
            print(f"\033]0;{self}\007", end="", file=sys.stderr)  # in the window's title

    def __str__(self):
        last = self.times[-32:]
        ms = 1e3 * (last[-1] - last[0]) / max(1, len(last) - 1)
        now, peak = self.cache.nbytes / 1e6, self.peak / 1e6
        tokens = len(self.times) - 1
        return f"{tokens} tokens, {ms:.1f} ms each, cache {now:.2f} MB, peak {peak:.2f} MB"
