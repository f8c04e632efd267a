"""Measure what the steps of a run cost; compare two revisions of alignfreeze.py.

    python tests/bench.py                                    a small BERT, invented sentences
    python tests/bench.py --model e5-small --data-dir data   a real encoder, real sentences
    python tests/bench.py --paper                            the paper's encoders, random weights
    python tests/bench.py --language-model llama --data-dir data   the second method, adapters
        --random                                             random weights, from the config alone
    python tests/bench.py --against OLD.py                   ratios to another revision

Medians over rounds in which everything is measured in turn. A batch of alignment has 16 sentence
pairs, whose words are linked beforehand unless the step says so, and one of PoS tagging 32
examples; those of a language model have 32. "host" is the time until the device was asked for
everything, "all" the time until it had finished. Of one more step, the profiler counts the
operators, and on a GPU the launches of kernels and the time that these took, "device".
"""

import argparse
import importlib.util
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers import AutoModelForTokenClassification as Classifier

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import alignfreeze as af

SMALL = {"model_type": "bert", "vocab_size": 20_002, "num_hidden_layers": 6, "hidden_size": 256}
SMALL |= {"num_attention_heads": 4, "intermediate_size": 1024, "pad_token_id": 0}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
BASE |= {"intermediate_size": 3072, "vocab_size": 119_547}
LARGE = {"vocab_size": 250_002, "max_position_embeddings": 514}
DISTIL = {"model_type": "distilbert", "num_hidden_layers": 6}
PAPER = {  # the configurations on the hub
    "distilbert-base-multilingual-cased": BASE | DISTIL,
    "bert-base-multilingual-cased": BASE | {"model_type": "bert"},
    "xlm-roberta-base": BASE | LARGE | {"model_type": "xlm-roberta"},
}


def invented() -> tuple[PreTrainedTokenizerFast, list[af.Pair], list[dict]]:
    """Return a tokenizer of one subword a word, sentence pairs, and tagged sentences."""
    words = [f"w{k}" for k in range(20_000)]
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    )
    rng, pairs, examples = random.Random(0), [], []
    for _ in range(512):
        size = rng.randint(4, 60)
        source, target = rng.choices(words, k=size), rng.choices(words, k=size)
        pairs.append(af.Pair("xx", source, target, [(k, k) for k in range(0, size, 5)]))
        examples.append({"tokens": source, "tags": [k % 17 for k in range(size)]})
    return tokenizer, pairs, examples


def real(tokenizer, settings: af.Settings) -> tuple[list[af.Pair], list[dict]]:
    """Return linked sentence pairs of several languages, and English sentences of the treebank."""
    pairs, _ = af.load_pairs(settings)
    examples = af.load_udpos("en", "train", settings)[:1024]
    return list(itertools.islice(pairs, 512)), examples


def build(config: dict, device: torch.device) -> torch.nn.Module:
    config = dict(config)
    config = AutoConfig.for_model(config.pop("model_type"), num_labels=18, **config)
    torch.manual_seed(0)
    return Classifier.from_config(config).to(device)


def encoder_steps(script, model, tokenizer, pairs, examples, settings) -> dict[str, Callable]:
    """Return {name: a step to measure}."""
    projection = script.projection_head(model.config.hidden_size, settings.unit).to(model.device)
    features = script.encode(script.TASKS["udpos"], tokenizer, examples[:512], 96, True)
    batches = itertools.cycle([pairs[k : k + 16] for k in range(0, 512, 16)])
    ready = [script.encode_pairs(tokenizer, next(batches), 96, model.device) for _ in range(8)]
    tasks = [features[k : k + 32] for k in range(0, 256, 32)]
    tasks = [script.task_batch(rows, tokenizer.pad_token_id, model.device) for rows in tasks]
    ready, tasks = itertools.cycle(ready), itertools.cycle(tasks)
    coming = script.prefetched(script.pair_batches(tokenizer, pairs, settings, model.device))

    def align(batch) -> None:
        with script.autocast(model.device, settings.precision):
            loss = script.alignment_loss(model.base_model, projection, batch, settings)
        loss.backward()

    def finetune() -> None:
        with script.autocast(model.device, settings.precision):
            loss = script.task_loss(model, next(tasks))
        loss.backward()

    def make() -> object:
        return script.encode_pairs(tokenizer, next(batches), 96, model.device)

    def evaluate() -> None:
        task, some = script.TASKS["udpos"], examples[:128]
        script.evaluate(model, tokenizer, task, some, features_of_test, settings)

    features_of_test = script.encode(script.TASKS["udpos"], tokenizer, examples[:128], 128, False)
    steps = {
        "alignment, batch ready": lambda: align(next(ready)),
        "alignment, batch made": lambda: align(make()),
        "alignment, batch by the thread": lambda: align(next(coming)),
        "a batch of sentence pairs": make,
        "fine-tuning": finetune,
        "evaluation of 128 sentences": evaluate,
    }
    if settings.data_dir:
        stream, _ = script.load_pairs(settings)
        linked = script.pair_batches(tokenizer, stream, settings, model.device)
        steps["a batch, its words linked too"] = lambda: next(linked)
    return steps


def decoder_steps(script, model, tokenizer, settings) -> dict[str, Callable]:
    task = script.TASKS[settings.task]
    examples = list(task.load(settings.train_languages[0], "train", settings))[:64]
    features = script.encode(task, tokenizer, examples, settings.max_length, True)
    pairs, _ = script.load_pairs(settings)
    pairs = list(itertools.islice(pairs, 32))
    rows = script.task_batch(features[:32], tokenizer.pad_token_id, model.device)
    batch = script.encode_texts(tokenizer, pairs, settings.realign_max_length, model.device)

    def backward(loss: Callable) -> None:
        with script.autocast(model.device, settings.precision):
            value = loss()
        value.backward()

    align = lambda: script.alignment_loss(  # noqa: E731
        model.base_model, torch.nn.Identity(), batch, settings
    )
    return {
        "task": lambda: backward(lambda: script.task_loss(model, rows)),
        "alignment": lambda: backward(align),
    }


def measure(steps: dict[str, Callable], rounds: int, model) -> dict[str, tuple]:
    """Return {name: (host, all)}, lists of seconds; the first round does not count."""
    is_gpu = model.device.type == "cuda"
    seconds = {name: ([], []) for name in steps}
    order = list(steps.items())
    for _ in range(rounds + 1):
        order.reverse()  # the second of two revisions may find its text in the processor's cache
        for name, step in order:
            model.zero_grad()
            model.train()  # evaluation has switched dropout off
            start = time.perf_counter()
            step()
            seconds[name][0].append(time.perf_counter() - start)
            if is_gpu:
                torch.cuda.synchronize()
            seconds[name][1].append(time.perf_counter() - start)
    return {name: (host[1:], whole[1:]) for name, (host, whole) in seconds.items()}


def profile(step: Callable) -> tuple[int, int, float]:
    """Return (operators, launches of kernels, milliseconds in kernels) of a step."""
    with torch.profiler.profile() as profiler:
        step()
    averages = profiler.key_averages()
    operators = sum(entry.count for entry in averages if entry.key.startswith("aten::"))
    launches = sum(entry.count for entry in averages if "LaunchKernel" in entry.key)
    kernels = [entry for entry in averages if entry.device_type.name != "CPU"]  # or counted twice
    return operators, launches, sum(entry.self_device_time_total for entry in kernels) / 1000


def report(title: str, steps: dict[str, Callable], rounds: int, model) -> None:
    """Measure the steps and print a table, with ratios to the steps of another revision."""
    seconds = measure(steps, rounds, model)
    is_gpu = model.device.type == "cuda"
    print(f"\n{title}, {model.num_parameters() / 1e6:.0f}M parameters, {model.device}")
    if is_gpu:
        print(f"memory at the peak: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    columns = ["host ms", "all ms", "operators"] + ["launches", "device ms"] * is_gpu
    print(" " * 32 + "".join(f"{column:>10}" for column in columns))
    for name in [name for name in steps if not name.startswith("old ")]:
        host, whole = (statistics.median(values) * 1000 for values in seconds[name])
        model.train()
        operators, launches, device = profile(steps[name])
        line = f"{name:32}{host:10.1f}{whole:10.1f}{operators:10}"
        if is_gpu:
            line += f"{launches:10}{device:10.1f}"
        if f"old {name}" in seconds:
            ratios = [a / b for a, b in zip(seconds[name][1], seconds[f"old {name}"][1])]
            line += f"   new / old {statistics.median(ratios):.3f}"
        print(line, flush=True)


def load_script(path: str):
    """Return another revision of alignfreeze.py as a module."""
    spec = importlib.util.spec_from_file_location("another_alignfreeze", path)
    module = sys.modules["another_alignfreeze"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", help="folder or hub id of an encoder")
    parser.add_argument("--language-model", help="folder or hub id of a decoder")
    parser.add_argument("--random", action="store_true", help="give the decoder random weights")
    parser.add_argument("--data-dir", type=Path, help="real sentences, as for alignfreeze.py")
    parser.add_argument("--paper", nargs="*", choices=PAPER, help="the paper's encoders")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="measure steps whose name contains this text")
    parser.add_argument("--device", help="as for alignfreeze.py")
    parser.add_argument("--against", help="another revision, of the same functions")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    device = af.set_up_device(args.device)
    scripts = {"": af} | ({"old ": load_script(args.against)} if args.against else {})
    if args.language_model:
        flags = ["--method", "mid-align", "--task", "massive", "--data-dir", str(args.data_dir)]
        flags += ["--model", args.language_model, "--precision", args.precision]
        settings = af.parse_args([*flags, "--train-languages", "en", "--realign-languages", "fa"])
        tokenizer, config = af.load_tokenizer(settings.model, generates=True)
        settings.layer = min(settings.layer, config.num_hidden_layers // 2)
        if args.random:
            model = AutoModelForCausalLM.from_config(config).to(device, torch.bfloat16)
            af.add_lora(model, settings.lora, settings.lora_alpha, settings.lora_dropout)
        else:
            model = af.build_model(settings, tokenizer, device)
        steps = {}
        for prefix, script in scripts.items():
            for name, step in decoder_steps(script, model, tokenizer, settings).items():
                if args.only in name:
                    steps[prefix + name] = step
        report(args.language_model, steps, args.rounds, model)
        return
    settings = af.Settings(data_dir=args.data_dir, precision=args.precision)
    settings.realign_languages = ["de", "tr", "ar", "hi"]
    tokenizer, pairs, examples = invented()
    configs = {"a small BERT": SMALL}
    if args.paper is not None:
        configs = {name: PAPER[name] for name in args.paper or PAPER}
    if args.model:
        tokenizer, _ = af.load_tokenizer(args.model)
        pairs, examples = real(tokenizer, settings)
        configs = {args.model: None}
    for title, config in configs.items():
        if config:
            model = build(config, device)
        else:
            model = af.load_model(args.model, Classifier, num_labels=18).to(device)
        steps = {}
        for prefix, script in scripts.items():
            given = script, model.train(), tokenizer, pairs, examples, settings
            for name, step in encoder_steps(*given).items():
                if args.only in name:
                    steps[prefix + name] = step
        report(title, steps, args.rounds, model)


if __name__ == "__main__":
    main()
