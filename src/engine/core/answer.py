"""`Answer`: the text of one sequence, from its ids to deltas and the finished output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.core.request import Sequence
from engine.outputs import CompletionOutput, Delta, TokenLogprobs
from engine.text.detokenizer import IncrementalDetokenizer, StopStringMatcher

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Answer:
    """Text side of one sequence. Engine thread only.

    `num_seen` ids have gone through the detokenizer (made for the first of them) into `text`; of
    these, `num_sent_tokens` ids and `num_sent_chars` characters were published. Ids past `num_seen`
    wait in the table.
    """

    seq: Sequence
    tokenizer: Tokenizer | None
    detokenizer: IncrementalDetokenizer | None = None
    matcher: StopStringMatcher | None = None
    text: str = ""
    num_seen: int = 0
    num_sent_tokens: int = 0
    num_sent_chars: int = 0
    logprobs: list[TokenLogprobs] | None = None
    num_sent_logprobs: int = 0
    output: CompletionOutput | None = None

    @classmethod
    def begin(cls, seq: Sequence, tokenizer: Tokenizer | None) -> Answer:
        """An empty one. Without a tokenizer its text stays empty."""
        params = seq.request.params
        answer = cls(seq, tokenizer)
        if params.logprobs is not None:
            answer.logprobs = []
        if tokenizer is not None and params.stop:
            answer.matcher = StopStringMatcher(
                tuple(params.stop), include_stop=params.include_stop_str_in_output
            )
        return answer

    def take(self, new: list[int]) -> None:
        """Run the ids behind the `num_seen` first through the detokenizer and the stop strings."""
        self.num_seen += len(new)
        if self.tokenizer is None or not new:
            return
        seq = self.seq
        if self.detokenizer is None:
            self.detokenizer = IncrementalDetokenizer(
                self.tokenizer, skip_special_tokens=seq.request.params.skip_special_tokens
            )
        # A complete constraint ends an answer too, without such a token.
        ends_with_stop_token = (
            seq.finish_reason == "stop"
            and new[-1] in seq.request.stop_token_ids
            and not seq.request.params.include_stop_str_in_output
        )
        if ends_with_stop_token:
            new = new[:-1]
        text = self.detokenizer.push(new)
        if self.matcher is None:
            self.text += text
        else:
            safe, _ = self.matcher.push(text)
            self.text += safe

    def finish(self, token_ids: list[int]) -> None:
        """Flush what the detokenizer and the matcher held back, and make the output of all ids.

        A stop string that only now is whole becomes the sequence's reason to end.
        """
        seq = self.seq
        matched = self.matcher is not None and self.matcher.matched is not None
        if self.detokenizer is not None and not matched:
            tail = self.detokenizer.flush()
            if self.matcher is None:
                self.text += tail
            else:
                safe, stop = self.matcher.push(tail)
                self.text += safe
                if stop is None:
                    self.text += self.matcher.flush()
                else:
                    seq.finish_reason, seq.stop_reason = "stop", stop
        logprobs = self.logprobs
        self.output = CompletionOutput(
            index=seq.index,
            text=self.text,
            token_ids=list(token_ids),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            logprobs=logprobs,
            cumulative_logprob=None
            if logprobs is None
            else sum(
                at[token_id].logprob for at, token_id in zip(logprobs, token_ids, strict=False)
            ),
        )

    def next_delta(self, new_ids: list[int]) -> Delta | None:
        """What is new, with the ids behind those sent; None when nothing is, except at the end."""
        text = self.text[self.num_sent_chars :]
        is_last = self.output is not None
        if not text and not new_ids and not is_last:
            return None
        logprobs = None
        if self.logprobs is not None:
            logprobs = self.logprobs[self.num_sent_logprobs :]
            self.num_sent_logprobs = len(self.logprobs)
        self.num_sent_chars = len(self.text)
        self.num_sent_tokens += len(new_ids)
        return Delta(
            index=self.seq.index,
            text=text,
            token_ids=new_ids,
            finish_reason=self.seq.finish_reason if is_last else None,
            stop_reason=self.seq.stop_reason if is_last else None,
            logprobs=logprobs,
        )
