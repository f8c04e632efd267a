"""What a realignment step costs, in units of a plain forward and backward pass of the same encoder over the same batch.

    python tests/bench_step.py                                   a small BERT with random weights, 16 sentence pairs
    python tests/bench_step.py --layers 12 --hidden 768 --rounds 3

float32, medians over rounds of one run, taken in turn; only the ratios mean something on another machine. A
realignment step is: tokenise 16 sentence pairs, encode them up to the realigned layer, contrastive loss, backward pass.
The plain pass is the whole encoder over the same sentences, padded to the longest. No optimiser in either.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import alignfreeze as af


def loop_loss(words: torch.Tensor, queries: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """`contrastive_loss` with a Python loop over words, which the vectorised one is measured against."""
    words, losses = torch.nn.functional.normalize(words, dim=-1), []
    for q, t in zip(queries.tolist(), targets.tolist()):
        others = torch.stack([words[q] @ words[w] for w in range(len(words)) if w != q])
        losses.append((others / temperature).logsumexp(0) - words[q] @ words[t] / temperature)
    return torch.stack(losses).mean()


def invent_pairs(vocabulary: list[str], count: int) -> list[af.Pair]:
    """Sentence pairs of 5 to 60 words, as in news text, a fifth of the words linked."""
    rng, pairs = random.Random(0), []
    for _ in range(count):
        length = min(60, 5 + int(rng.expovariate(1 / 18)))
        source, target = (rng.choices(vocabulary, k=length) for _ in range(2))
        pairs.append(af.Pair("xx", source, target, [(i, i) for i in range(0, length, 5)]))
    return pairs


def measure(steps: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, float]:
    """Seconds of each step, the median over rounds; every round runs each step once, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step().backward()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    vocabulary = [f"w{k}" for k in range(20_000)]
    backend = Tokenizer(models.WordLevel({w: k for k, w in enumerate(["[PAD]", "[UNK]", *vocabulary])}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    shape = {"num_hidden_layers": args.layers, "hidden_size": args.hidden, "num_attention_heads": args.hidden // 64}
    encoder = BertModel(BertConfig(vocab_size=20_002, intermediate_size=4 * args.hidden, **shape)).train()
    projection, pairs = af.projection_head(args.hidden), invent_pairs(vocabulary, args.pairs)
    whole = af.encode_pairs(tokenizer, pairs)

    def plain() -> torch.Tensor:
        return encoder(**whole.inputs[0]).last_hidden_state.sum()

    def realignment(parts: int, loss: Callable = af.contrastive_loss) -> torch.Tensor:
        batch = af.encode_pairs(tokenizer, pairs, parts=parts)
        hidden = [af.hidden_state(encoder, part, -2).flatten(0, 1) for part in af.embed(encoder, batch.inputs)]
        return loss(projection(torch.cat(hidden)[batch.words]), batch.queries, batch.targets, 0.1)

    def loss_alone(loss: Callable) -> Callable[[], torch.Tensor]:
        words = torch.randn(len(whole.words), 128, requires_grad=True)
        return lambda: loss(words, whole.queries, whole.targets, 0.1)

    names = "plain forward and backward pass", "realignment step, whole batch", "realignment step, in 8 parts (CPU)"
    names += "realignment step, loss by loops", "the loss alone", "the loss alone, by loops"
    steps = plain, lambda: realignment(1), lambda: realignment(8), lambda: realignment(1, loop_loss)
    steps += loss_alone(af.contrastive_loss), loss_alone(loop_loss)
    seconds = measure(dict(zip(names, steps)), args.rounds)

    size = f"{encoder.num_parameters() / 1e6:.0f}M parameters, {args.layers} layers x {args.hidden}"
    tokens, useful = whole.inputs[0]["input_ids"].numel(), int(whole.inputs[0]["attention_mask"].sum())
    print(f"{size}; {2 * args.pairs} sentences, {tokens} subwords with padding, {useful} without;")
    print(f"{len(whole.words)} words, {len(whole.queries)} queries; float32, {torch.get_num_threads()} threads\n")
    print(f"{'':36}{'ratio':>8}{'seconds':>10}")
    for name, value in seconds.items():
        print(f"{name:36}{value / seconds[names[0]]:8.2f}{value:10.3f}")


if __name__ == "__main__":
    main()
