"""The README is short, agrees with the script and the results, and its recipes work as written."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import alignfreeze as af

ROOT = Path(af.__file__).parent
SCRIPT = Path(af.__file__).read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
DIFF = re.findall(r"```diff\n(.*?)```", README, re.S)
METHODS = ("alignfreeze", "mid-align")


# ---- Its form ------------------------------------------------------------------------------------


def cells() -> list[str]:
    """Return the cells of all tables, as they are shown: without marks of code and of links."""
    shown = []
    for line in README.splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            for cell in line.strip("|").split("|"):
                shown.append(re.sub(r"\[(.*?)\]\[.*?\]|`", r"\1", cell).strip())
    return shown


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 160
    assert [line for line in lines if len(line) > 120] == []


def test_its_tables_can_be_scanned():
    assert len(cells()) > 80
    assert [cell for cell in cells() if len(cell) > 60] == []


def test_every_verdict_is_short():
    verdicts = re.findall(r"\| \[(.*?)\]\[.\] \|$", README, re.M)
    assert len(verdicts) > 5
    assert set(verdicts) == {
        "their XLM-R", "theirs", "their NER, NLI", "their NLI", "ours", "neither",
    }  # fmt: skip


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\((.*?)\)|^\[\w+\]: (\S+)$", README, re.M)
    local = [a or b for a, b in targets if not (a or b).startswith("https:")]
    assert len(local) > 5
    for target in local:
        name, _, anchor = target.partition("#")
        assert (ROOT / name).exists(), name
        assert not anchor or anchor in anchors(ROOT / name), target


def test_every_numbered_link_is_defined_and_used():
    defined = set(re.findall(r"^\[(\w+)\]: ", README, re.M))
    assert defined == set(re.findall(r"\]\[(\w+)\]", README))


# ---- The script ----------------------------------------------------------------------------------


def section(start: str) -> str:
    """Return the section under a heading."""
    (part,) = (part for part in README.split("\n## ")[1:] if part.startswith(start))
    return part


def test_the_loss_is_that_of_the_script():
    formula = re.search(r"`loss = (mean over .*?)`", section("The lesson"))[1]
    assert formula in af.contrastive_loss.__doc__


def test_functions_that_the_lesson_names_exist():
    names = re.findall(r"`(\w+)`", section("The lesson"))
    assert len(names) > 9
    assert [name for name in names if not hasattr(af, name)] == []


def test_flags_that_it_names_exist():
    flags = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", README))
    assert len(flags) > 20
    settings = {af.flag_of(field.name) for field in dataclasses.fields(af.Settings)}
    others = {"--help", "--dry-run", "--nproc", "--index-url", "--weak"}  # the last: a recipe
    assert flags - settings <= others


def test_the_table_of_defaults_is_that_of_the_script():
    defaults = [af.parse_args(["--method", method]) for method in METHODS]
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \| ([^|]*) \|$", README, re.M)
    in_table = set()
    for flags, *columns in rows:
        names = [flag.strip("` -").replace("-", "_") for flag in flags.split(",")]
        for settings, column in zip(defaults, columns):
            assert column.split(", ") == [str(getattr(settings, name)) for name in names]
        in_table.update(names)
    assert in_table >= set(af.PRESETS["--method mid-align"])


def test_the_defaults_of_single_models_are_those_of_the_script():
    for model in set(af.PRESETS) - {"--method mid-align"}:
        for name, value in af.PRESETS[model].items():
            assert f"`{model}`" in README
            flag = re.search(f"`{af.flag_of(name)} ([^` ]+)`", README)
            assert float(flag[1]) == value


def test_differences_that_can_be_read_off_the_script():
    text = section("Where this differs")
    smaller = (ROOT / "results/differences.md").read_text("utf-8")
    smaller, massive = " ".join(smaller.split()), af.TASKS["massive"]
    aligned = " ".join(massive.realign_languages)
    assert f"{massive.limit_links} of its own commands in each of {aligned}," in smaller
    assert f"{af.Settings().limit_links:,} lines a language" in smaller
    assert af.Settings().layer == -2 and "the last but one; `--layer -1`" in text


# ---- The library ---------------------------------------------------------------------------------


def copy_of_weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def run_example(world: Path, monkeypatch) -> tuple[dict, list[dict]]:
    """Run the example with a tiny model; return its variables, and its weights.

    The weights are those before and after the alignment.
    """
    hub_id = '"intfloat/multilingual-e5-small"'
    example = PYTHON[0]
    assert hub_id in example
    weights = []
    original = af.realign

    def realign(model, *args, **kwargs):
        weights.append(copy_of_weights(model))
        original(model, *args, **kwargs)
        weights.append(copy_of_weights(model))

    monkeypatch.setattr(af, "realign", realign)
    variables: dict = {}
    exec(example.replace(hub_id, repr(str(world / "models/bert"))), variables)
    return variables, weights


def test_the_example_prints_what_stands_below_it(world, monkeypatch, capsys):
    run_example(world, monkeypatch)
    expected = re.findall(r"^# (.*)$", PYTHON[0], re.M)
    printed = capsys.readouterr().out.splitlines()

    def without_values(lines: list[str]) -> list[str]:
        tags = "|".join(af.UPOS)
        return [re.sub(r"\d+\.\d+", "0", re.sub(rf"\b({tags})\b", "TAG", line)) for line in lines]

    assert without_values(printed) == without_values(expected)
    assert without_values(expected)[2] == "{'accuracy': 0} TAG TAG TAG TAG TAG"
    for line in printed[:2] + expected[:2]:
        first, last = re.search(r"loss ([\d.]+) -> ([\d.]+)", line).groups()
        assert float(last) < float(first)


def test_the_example_freezes_the_lower_half_during_alignment_only(world, monkeypatch):
    variables, (before, aligned) = run_example(world, monkeypatch)
    finetuned = variables["model"].state_dict()
    half = variables["model"].config.num_hidden_layers // 2
    moved = {name for name in before if not torch.equal(before[name], aligned[name])}
    lower = {name for name in before if re.search(r"\.layer\.(\d+)\.", name)}
    lower = {name for name in lower if int(re.search(r"\.layer\.(\d+)\.", name)[1]) < half}
    assert lower and not lower & moved
    assert "bert.embeddings.word_embeddings.weight" in moved
    assert all(not torch.equal(aligned[n], finetuned[n]) for n in lower if "weight" in n)


# ---- The recipes ---------------------------------------------------------------------------------


def after(script: str, line: str, addition: str) -> str:
    """Return the script with an addition after a line, which it has once."""
    assert script.count(f"{line}\n") == 1, line
    return script.replace(f"{line}\n", f"{line}\n{addition}")


def load(script: str, folder: Path):
    """Return a changed copy of the script as a module."""
    path = folder / "fork.py"
    path.write_text(script, "utf-8")
    spec = importlib.util.spec_from_file_location("fork", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fork"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def patched(diff: str) -> str:
    """Return the script with the added lines of a diff, each group after the line above it."""
    script, line, addition = SCRIPT, "", ""
    for row in [*diff.splitlines(), " "]:
        if row.startswith("+"):
            addition += f"{row[1:]}\n"
            continue
        script = after(script, line, addition) if addition else script
        line, addition = row[1:], ""
    return script


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    (diff,) = DIFF
    assert sum(row.startswith("+") for row in diff.splitlines()) == 6
    assert "these lines to `Settings` and `alignment_loss`, `weak` to `OF_ALIGNMENT`" in README
    script = patched(diff).replace('OF_ALIGNMENT = """', 'OF_ALIGNMENT = """weak ')
    return load(script, tmp_path_factory.mktemp("weak"))


def slow_weak_loss(vectors, batch, sides: list[int], temperature: float) -> float:
    """Return the loss over the words of the other language, word by word."""
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    losses = []
    for q, t in zip(batch.queries.tolist(), batch.targets.tolist()):
        others = [c for c in range(len(vectors)) if sides[c] != sides[q]]
        scores = torch.stack([vectors[q] @ vectors[c] for c in others]) / temperature
        losses.append(torch.logsumexp(scores, 0) - scores[others.index(t)])
    return torch.stack(losses).mean().item()


def test_another_loss(weak):
    import tiny

    model, tokenizer = tiny.build("bert", spread=0.5), tiny.make_tokenizer()
    batch = af.encode_pairs(tokenizer, tiny.word_pairs(), 64)
    settings = weak.Settings(weak=True, temperature=0.2)
    model.eval()
    loss = weak.alignment_loss(model.base_model, torch.nn.Identity(), batch, settings)
    hidden = af.hidden_state(model.base_model, batch.inputs, settings.layer)
    length = batch.inputs["input_ids"].shape[1]
    sides = [int(k) // length >= len(batch.pairs) for k in batch.positions]
    expected = slow_weak_loss(af.vectors_of(hidden, batch), batch, sides, 0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    strong = weak.alignment_loss(
        model.base_model, torch.nn.Identity(), batch, dataclasses.replace(settings, weak=False)
    )
    assert strong.item() > loss.item() + 0.01  # more negatives


def test_another_loss_is_a_flag(weak):
    assert weak.parse_args(["--weak"]).weak is True
    assert weak.parse_args([]).weak is False


def test_another_loss_leaves_the_name_of_a_baseline_alone(weak):
    """One baseline serves runs with and without the flag."""
    for strategy, is_shared in (("baseline", True), ("front", False)):
        flags = ["--strategy", strategy]
        plain, flagged = (weak.parse_args([*flags, *more]) for more in ([], ["--weak"]))
        assert (weak.record_name(plain) == weak.record_name(flagged)) == is_shared


def test_recipes_have_the_width_of_the_script():
    lines = [line for block in (*PYTHON[1:], *DIFF) for line in block.splitlines()]
    assert len(lines) > 10 and max(map(len, lines)) <= 101  # a diff has one more column


def test_a_freezing_rule(world, tmp_path):
    (line,) = (line for line in SCRIPT.splitlines() if line.endswith("  # named schemes"))
    assert line.startswith("    groups = ") and "below `groups =` in `layer_numbers`" in README
    (addition,) = re.findall(r"`(groups\[.*?)`", README)
    fork = load(after(SCRIPT, line, f"    {addition}\n"), tmp_path)
    assert fork.layer_numbers("even", 12) == {0, 2, 4, 6, 8, 10}
    assert fork.layer_numbers("even,11", 12) == {0, 2, 4, 6, 8, 10, 11}


def write_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def test_a_task(world, tmp_path):
    recipe = PYTHON[1]
    start = SCRIPT.index("TASKS = {")
    end = SCRIPT.index("}  # fmt: skip\n", start) + len("}  # fmt: skip\n")
    fork = load(SCRIPT[:end] + recipe + SCRIPT[end:], tmp_path)
    data = tmp_path / "DIR"
    texts = [json.dumps({"text": f"the dog sleeps {k}", "label": k % 2}) for k in range(8)]
    for name in ("en/train", "en/test", "de/test"):
        write_lines(data / f"topic/{name}.jsonl", *texts)
    write_lines(data / "parallel/en-de.tsv", *["the dog sleeps\tder Hund schläft"] * 20)
    write_lines(data / "dictionary/en-de.txt", "dog Hund", "sleeps schläft")
    flags = re.search(r"run with `(--task topic .*?)`", README)[1].replace("DIR", str(data))
    command = [
        *flags.split(),
        "--model",
        str(world / "models/bert"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert fork.main([*command, "--device", "cpu", "--epochs", "1"]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    record = json.loads(path.read_text("utf-8"))
    assert record["task"] == "topic" and record["steps"] == {"realign": 1, "finetune": 1}
    assert set(record["scores"]) == {"en", "de"}


def test_own_word_links(world, tmp_path):
    """`en-de.words.txt` is what the README says, and its links are read as it says."""
    (tmp_path / "data/parallel").mkdir(parents=True)
    text = " ".join(section("For the forker").split())
    (tmp_path / "data/parallel/en-de.tsv").write_text("Don't go\tGeh nicht\n", "utf-8")
    links = tmp_path / "links"
    flags = ["--data-dir", tmp_path / "data", "--realign-languages", "de"]
    command = ["--write-links", links, "--aligner", "none", *flags]
    shown = "--write-links LINKS --aligner none --data-dir DIR --realign-languages de"
    assert f"`{shown}`" in text
    assert af.main([*map(str, command)]) == 0
    (written,) = (links / "en-de.words.txt").read_text("utf-8").splitlines()
    assert f"such as `{written}`" in text
    (row,) = re.findall(r"has a line such as `(.*?)`", text)
    (links / "en-de.txt").write_text(row + "\n", "utf-8")
    settings = af.parse_args([*map(str, ["--aligner", links, *flags])])
    pair = next(af.ParallelText("de", settings).stream())
    linked = [(pair.source[i], pair.target[j]) for i, j in pair.links]
    assert linked == [("t", "nicht"), ("go", "Geh")]
    (links / "en-de.txt").write_text("3-0 2-1 0-0\n", "utf-8")  # `Geh` has two links
    pair = next(af.ParallelText("de", settings).stream())
    assert pair.links == [(2, 1)] and "links that share a word are dropped" in text


# ---- Local data ----------------------------------------------------------------------------------


def test_the_command_for_ones_own_language_needs_the_files_that_are_listed(world, tmp_path):
    text = section("Local data")
    (command,) = re.findall(r"^\.venv/bin/python alignfreeze.py (.*)$", text, re.M)
    data = tmp_path / "DIR"
    flags = command.replace("xlm-roberta-base", str(world / "models/bert"))
    flags = flags.replace("DIR", str(data)).split()
    words = {"en": ["the", "dog", "sleeps"], "sw": ["mbwa", "huyo", "analala"]}
    for name in ("en/train", "en/test", "sw/test"):
        forms = zip(words[name[:2]], ("DET", "NOUN", "VERB"), strict=True)
        rows = [f"{k}\t{form}\t_\t{tag}" + "\t_" * 6 for k, (form, tag) in enumerate(forms, 1)]
        write_lines(data / f"udpos/{name}.conllu", *[*rows, ""] * 4)
    write_lines(data / "parallel/en-sw.tsv", *["the dog sleeps\tmbwa huyo analala"] * 20)
    write_lines(data / "dictionary/en-sw.txt", "dog mbwa", "sleeps analala")
    rest = ["--out", str(tmp_path / "out"), "--device", "cpu", "--epochs", "1"]
    files = sorted(path for path in data.rglob("*") if path.is_file())
    for path in files:  # each of them is needed
        assert path.name in text
        path.rename(path.with_suffix(".away"))
        assert af.main([*flags, *rest]) == 2
        path.with_suffix(".away").rename(path)
    assert len(files) == 5 and af.main([*flags, *rest]) == 0
    (record,) = (tmp_path / "out").glob("*.json")
    scores = json.loads(record.read_text("utf-8"))["scores"]
    assert set(scores) == {"en", "sw"}
