"""What the steps of a run cost, in units of a plain pass, and what of it is padding, waiting, start-up and memory.

    python tests/bench.py                                        a small BERT with random weights, invented sentences
    python tests/bench.py --model e5-small --data-dir data       a real encoder, real sentences
    python tests/bench.py --paper                                the paper's three encoders with random weights; memory

One run, medians over rounds in which everything is measured in turn; only the ratios mean something on another machine.
Every realignment step has 16 sentence pairs, every fine-tuning step 32 examples of PoS tagging.
"""

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForTokenClassification, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import alignfreeze as af  # noqa: E402

SMALL = {"model_type": "bert", "vocab_size": 20_002, "num_hidden_layers": 6, "hidden_size": 256}
SMALL |= {"num_attention_heads": 4, "intermediate_size": 1024, "pad_token_id": 0}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
PAPER = {  # the configurations on the hub
    "distilbert-base-multilingual-cased": {"model_type": "distilbert", "vocab_size": 119_547, "n_layers": 6},
    "bert-base-multilingual-cased": BASE | {"model_type": "bert", "vocab_size": 119_547},
    "xlm-roberta-base": BASE | {"model_type": "xlm-roberta", "vocab_size": 250_002, "max_position_embeddings": 514},
}
STEPS = {"udpos": 1965, "wikiann": 3130, "xquad": 18_010, "xnli": 24_544}  # of the authors' runs, either stage
GRID = 3 * 5  # strategies that realign, and seeds: runs of a model and a task with the dictionary, before fine-tuning


# ------------------------------------------------------------------------------------------------ what is computed


def words_of_news(rng: random.Random) -> int:
    return min(60, 5 + int(rng.expovariate(1 / 18)))


def invented() -> tuple[PreTrainedTokenizerFast, Iterator[af.Pair], list[dict]]:
    """A tokenizer of whole words; sentences of 5 to 60 words, as in news text, a fifth of the words linked."""
    rng, vocabulary = random.Random(0), [f"w{k}" for k in range(20_000)]
    backend = Tokenizer(models.WordLevel({w: k for k, w in enumerate(["[PAD]", "[UNK]", *vocabulary])}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")

    def pairs() -> Iterator[af.Pair]:
        while True:
            size = words_of_news(rng)
            source, target = (rng.choices(vocabulary, k=size) for _ in range(2))
            yield af.Pair("xx", source, target, [(i, i) for i in range(0, size, 5)])

    sizes = [words_of_news(rng) for _ in range(2000)]
    examples = [{"tokens": rng.choices(vocabulary, k=size), "tags": rng.choices(range(17), k=size)} for size in sizes]
    return tokenizer, pairs(), af.encode_tokens(tokenizer, examples, 96, True)


def real(model: str, data_dir: Path) -> tuple[PreTrainedTokenizerFast, Iterator[af.Pair], list[dict]]:
    """Linked sentence pairs of all languages that there are, and the English treebank, with a real tokenizer."""
    tokenizer, _ = af.load_tokenizer(model)
    streams = [af.linked_pairs(code, "dictionary", data_dir, 31) for code in codes(data_dir)]
    examples = af.load_udpos("en", "train", af.parse_args(["--data-dir", str(data_dir)]))[:2000]
    return tokenizer, af.interleave(streams), af.encode_tokens(tokenizer, examples, 96, True)


def codes(data_dir: Path) -> list[str]:
    """The languages that have parallel text, a dictionary and a treebank."""
    found = [path.stem.removeprefix("en-") for path in sorted(data_dir.glob("parallel/en-*.tsv"))]
    wanted = "dictionary/en-{}.txt", "udpos/{}/test.conllu"
    return [code for code in found if all((data_dir / name.format(code)).exists() for name in wanted)]


def loss_by_loops(words: torch.Tensor, queries: torch.Tensor, targets: torch.Tensor, temperature: float = 0.1):
    """`contrastive_loss` with a Python loop over words, as in the authors' code."""
    words, losses = torch.nn.functional.normalize(words, dim=-1), []
    for q, t in zip(queries.tolist(), targets.tolist()):
        others = torch.stack([words[q] @ words[w] for w in range(len(words)) if w != q])
        losses.append((others / temperature).logsumexp(0) - words[q] @ words[t] / temperature)
    return torch.stack(losses).mean()


# --------------------------------------------------------------------------------------------------- measuring


def measure(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of each step, the median over rounds; every round runs each step once, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def step_of(
    model, tokenizer, pairs: list, features: list, device, spec="none", precision="fp32", parts=None, loss=None
):
    """(a realignment step, a fine-tuning step), each with forward and backward pass, without the optimiser."""
    parts = parts or af.PARTS.get(device.type, 1)
    projection = af.projection_head(model.config.hidden_size).to(device)
    batch = af.encode_pairs(tokenizer, pairs, parts=parts, device=device)
    examples = af.task_batch(features, tokenizer.pad_token_id, parts, device)

    def aligned(batch):
        hidden = [af.hidden_state(model.base_model, part, -2).flatten(0, 1) for part in af.embed(model, batch.inputs)]
        return loss(projection(torch.cat(hidden)[batch.words]).float(), batch.queries, batch.targets)

    usual = lambda batch: af.realignment_loss(model.base_model, projection, batch)  # noqa: E731
    realignment = af.Objective(aligned if loss else usual, [model, projection], precision)
    task = af.Objective(lambda batch: af.task_loss(model, batch), [model], precision)

    def run(objective, batch):
        model.zero_grad()
        af.freeze(model, spec)
        objective(batch).backward()
        model.requires_grad_(True)

    return lambda: run(realignment, batch), lambda: run(task, examples)


def plain(model, tokenizer, pairs: list, device, parts: int) -> Callable[[], None]:
    """A forward and backward pass of the whole encoder over the sentences of a batch, and nothing else."""
    batch = af.encode_pairs(tokenizer, pairs, parts=parts, device=device)

    def run() -> None:
        model.zero_grad()
        for inputs in batch.inputs:
            model.base_model(**inputs).last_hidden_state.sum().backward()

    return run


def build(config: dict, device: torch.device):
    """An encoder with random weights."""
    torch.manual_seed(0)
    shape = {name: value for name, value in config.items() if name != "model_type"}
    config = AutoConfig.for_model(config["model_type"], num_labels=18, **shape)
    return AutoModelForTokenClassification.from_config(config).to(device).train()


def show(title: str, rows: dict[str, float], unit: float | None = None) -> None:
    print(f"\n{title:60}" + (f"{'ratio':>8}{'seconds':>10}" if unit else ""))
    for name, value in rows.items():
        print(f"  {name:58}" + (f"{value / unit:8.2f}{value:10.3f}" if unit else f"{value:>8}"), flush=True)


def steps_table(
    name: str, model, tokenizer, pairs: list, features: list, device, rounds: int, loops: bool = False
) -> dict:
    steps, parts = {}, af.PARTS.get(device.type, 1)
    steps["plain pass over the padded batch"] = plain(model, tokenizer, pairs, device, 1)
    if parts > 1:
        steps[f"plain pass, in {parts} parts of similar length"] = plain(model, tokenizer, pairs, device, parts)
        steps["realignment, the padded batch"] = step_of(model, tokenizer, pairs, features, device, parts=1)[0]
    usual = step_of(model, tokenizer, pairs, features, device)
    steps["realignment"] = usual[0]
    half = model.config.num_hidden_layers // 2 - 1
    for spec in ("front", "back", f"emb,0-{half}"):
        steps[f"realignment, {spec} frozen"] = step_of(model, tokenizer, pairs, features, device, spec)[0]
    if loops:
        steps["realignment, loss by loops over words"] = step_of(
            model, tokenizer, pairs, features, device, loss=loss_by_loops
        )[0]
    steps["fine-tuning"] = usual[1]
    steps["fine-tuning, the padded batch"] = step_of(model, tokenizer, pairs, features, device, parts=1)[1]
    low = step_of(model, tokenizer, pairs, features, device, precision="bf16")
    steps["realignment, bf16"], steps["fine-tuning, bf16"] = low
    for fused in (True, False):
        model.zero_grad()
        usual[1]()
        adam = torch.optim.Adam(model.parameters(), 1e-9, fused=fused)
        steps[f"Adam, {'fused' if fused else 'the default'}"] = adam.step
    seconds = measure(steps, rounds, device)
    size = f"{model.num_parameters() / 1e6:.0f}M parameters"
    show(f"{name}, {size}, float32", seconds, seconds["plain pass over the padded batch"])
    return seconds


def padding(features: list[dict], batches: list[list]) -> float:
    """Useful subwords over computed subwords of a training epoch in parts, or in evaluation."""
    lengths = [[len(feature["input_ids"]) for feature in batch] for batch in batches]
    return sum(map(sum, lengths)) / sum(len(batch) * max(batch) for batch in lengths)


def shares_table(features: list[dict]) -> None:
    shuffled, length = random.Random(0).sample(features, len(features)), lambda feature: len(feature["input_ids"])
    chunks = list(af.in_chunks(iter(shuffled), 32))
    parts = [group for chunk in chunks for group in af.by_length(chunk, af.PARTS["cpu"], length)]
    ordered = list(af.in_chunks(iter(sorted(features, key=length)), 32))
    rows = {"training, batches of 32": chunks, "training, in 8 parts of similar length": parts, "evaluation": ordered}
    show("useful of computed subwords", {name: f"{padding(features, rows[name]):.2f}" for name in rows})


def waiting_table(model, tokenizer, pairs: Iterator, device, steps: int = 12) -> None:
    """How long a training step waits for its batch, made before or after the step before it ends."""
    rows = {}
    for name, ahead in (("made when it is needed", False), ("made ahead, by a thread", True)):
        batches = itertools.islice(af.realignment_batches(tokenizer, pairs, device=device), steps)
        projection, waited, total = af.projection_head(model.config.hidden_size).to(device), 0.0, time.perf_counter()
        batches = af.ahead(batches) if ahead else batches
        next(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - start
            if batch is None:
                break
            af.realignment_loss(model.base_model, projection, batch).backward()
        rows[f"a batch {name}"] = f"{100 * waited / (time.perf_counter() - total):.2f}%"
    show("of a realignment step, waiting for its batch", rows)


def start_table(model: str, data_dir: Path) -> None:
    """Seconds from the command to the first training step of a PoS run of the paper's size, 34 languages.

    Languages that are not there are copies of those that are.
    """
    with tempfile.TemporaryDirectory() as folder:
        known = itertools.cycle(codes(data_dir))
        names = "parallel/en-{}.tsv", "dictionary/en-{}.txt", "dictionary/{}-en.txt", "udpos/{}/test.conllu"
        for code, other in zip(af.TARGETS, known):
            for name in names:
                if (source := data_dir / name.format(other)).exists():
                    (path := Path(folder, "data", name.format(code))).parent.mkdir(parents=True, exist_ok=True)
                    path.symlink_to(source.resolve())
        Path(folder, "data/udpos/en").symlink_to((data_dir / "udpos/en").resolve())
        command = [sys.executable, ROOT / "alignfreeze.py", "--model", model, "--data-dir", f"{folder}/data"]
        start, lines = time.time(), []
        with subprocess.Popen([*command, "--out", folder], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                lines.append(line.strip())
                if "parameters on" in line:
                    process.kill()
        show("from the command to the first step, 34 languages", {"seconds": f"{time.time() - start:.1f}"})
        print("   ", *lines[:2], sep="\n    ")


def evaluation_table(model, tokenizer, data_dir: Path, seconds: dict, precision: str, limit: int = 200) -> None:
    """What evaluation costs beside both stages of training, from a sample of each test set."""
    args, task, total, subwords = af.parse_args(["--data-dir", str(data_dir)]), af.TASKS["udpos"], 0.0, 0
    languages = codes(data_dir)
    for code in languages:
        examples = task.load(code, "test", args)
        sample = random.Random(0).sample(examples, min(limit, len(examples)))
        features = af.encode(task, tokenizer, sample, 128, False)
        start = time.perf_counter()
        af.evaluate(model, task, sample, features, tokenizer.pad_token_id, precision)
        total += (time.perf_counter() - start) * len(examples) / len(sample) * 34 / len(languages)
        subwords += len(examples)
    model.train()
    names = ("realignment", "fine-tuning") if precision == "fp32" else ("realignment, bf16", "fine-tuning, bf16")
    adam = seconds["Adam, fused"]
    training = STEPS["udpos"] * sum(seconds[name] + adam for name in names)
    share = f"{100 * total / (training + total):.1f}%"
    rows = {f"34 languages of {subwords // len(languages)} sentences, {precision}": share}
    show("evaluation's share of a PoS run of the paper's size", rows)


MEMORY = """
import json, resource, sys
sys.path[:0] = [{root!r}, {tests!r}]
import bench, torch
bench.memory_of({name!r}, {model!r}, {data_dir!r}, {device!r}, {precision!r})
"""


def memory_of(name: str, model: str, data_dir: str, device: str, precision: str) -> None:
    """In a process of its own: three steps of either stage with Adam, then the peak in GiB (on a CPU, Linux only)."""
    device = torch.device(device)
    tokenizer, pairs, features = real(model, Path(data_dir)) if data_dir else invented()
    encoder = build(PAPER[name], device)
    af.say = lambda line: None
    af.realign(encoder, tokenizer, pairs, steps=3, precision=precision)
    af.finetune(encoder, features[:96], tokenizer.pad_token_id, epochs=1, precision=precision)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:  # not getrusage, which begins with the memory of the process that started this one
        status = Path("/proc/self/status").read_text("utf-8")
        peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    print(json.dumps(peak))


def memory_table(names: list[str], args: argparse.Namespace, device: torch.device) -> None:
    rows, here = {}, {"root": str(ROOT), "tests": str(ROOT / "tests"), "model": args.model, "device": str(device)}
    for name, precision in itertools.product(names, ("fp32", "bf16")):
        code = MEMORY.format(name=name, precision=precision, data_dir=str(args.data_dir or ""), **here)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        rows[f"{name}, {precision}"] = f"{json.loads(done.stdout.splitlines()[-1]):.1f} GiB"
    show("peak memory of both stages, nothing frozen", rows)


def grid_table(seconds: dict[str, dict[str, float]]) -> None:
    """Realignment of all four tasks from the first step, or once, with --realign-cache."""
    rows = {}
    for name, of in seconds.items():
        steps = STEPS | ({"xquad": 20_228} if "xlm" in name else {})
        anew, once = GRID * sum(steps.values()), GRID * max(steps.values())
        for precision in ("", ", bf16"):
            hours = (of[f"realignment{precision}"] + of["Adam, fused"]) / 3600
            label = f"{name}{precision or ', fp32'}"
            rows[label] = f"  {anew:,} steps, {anew * hours:,.0f} h -> {once:,} steps, {once * hours:,.0f} h"
    show("realignment of the grid (dictionary, before, nothing frozen) on this device", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub id of an encoder (default: a small BERT, random weights)")
    parser.add_argument("--data-dir", type=Path, help="real sentences, as for alignfreeze.py; with --model")
    parser.add_argument(
        "--paper", nargs="*", choices=PAPER, help="instead, these of the paper's encoders (default: all): steps, memory"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if bool(args.model) != bool(args.data_dir):
        parser.error("--model and --data-dir go together")
    if args.paper is not None and args.model and len(af.load_tokenizer(args.model)[0]) > 119_547:
        parser.error(f"--paper: the vocabulary of {args.model} is larger than that of multilingual BERT")
    device = torch.device(args.device)
    tokenizer, pairs, features = real(args.model, args.data_dir) if args.model else invented()
    chunk, examples = list(itertools.islice(pairs, 16)), features[:32]
    whole = af.encode_pairs(tokenizer, chunk)
    useful, padded = int(whole.inputs[0]["attention_mask"].sum()), whole.inputs[0]["attention_mask"].numel()
    print(f"16 sentence pairs: {useful} subwords, {padded} with padding; {len(whole.words)} words, ", end="")
    print(f"{len(whole.queries)} queries; {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    if args.paper is not None:
        seconds, names = {}, args.paper or list(PAPER)
        for name in names:
            model = build(PAPER[name], device)
            seconds[name] = steps_table(name, model, tokenizer, chunk, examples, device, args.rounds)
            del model
        grid_table(seconds)
        memory_table(names, args, device)
        return
    if args.model:
        model = AutoModelForTokenClassification.from_pretrained(args.model, num_labels=18, dtype=torch.float32)
        model = model.to(device).train()
    else:
        model = build(SMALL, device)
    name = Path(args.model or "a small BERT").name
    seconds = steps_table(name, model, tokenizer, chunk, examples, device, args.rounds, loops=True)
    shares_table(features)
    waiting_table(model, tokenizer, pairs, device)
    if args.model:
        for precision in ("fp32", "bf16"):
            evaluation_table(model, tokenizer, args.data_dir, seconds, precision)
        start_table(args.model, args.data_dir)


if __name__ == "__main__":
    af.transformers.utils.logging.set_verbosity_error()
    af.transformers.utils.logging.disable_progress_bar()
    main()
