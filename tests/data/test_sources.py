"""Files are found, checked and kept; a cache is whole or is not trusted."""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf_jax.data import builders, records, sources
from rlhf_jax.data.inputs import FilesConfig, Inputs
from rlhf_jax.data.simulation import SimulationConfig
from rlhf_jax.data.simulation import campaign as simulation_campaign
from rlhf_jax.data.sources import DataError, Demonstration, Prompt, Ranking, load

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path):
    """A data directory with a file of each kind, and the records they hold."""
    root = tmp_path / "data"
    lines = {
        "demonstrations/a.jsonl": [{"prompt": "p", "response": "r\u00e9\n\n"}],
        "demonstrations/b.jsonl": [
            {"prompt": f"p{i}", "response": f"r{i}"} for i in range(50)
        ],
        "rankings/a.jsonl": [
            {"prompt": "p", "responses": ["a", "b", ""], "ranks": [2, 1, 1]},
            {
                "prompt": "q",
                "responses": ["a", "b"],
                "ranks": [1, 2],
                "ended": [False, True],
                "labeler": "ann",
            },
        ],
        "comparisons/a.jsonl": [{"prompt": "p", "chosen": "c", "rejected": ""}],
        "prompts/a.jsonl": [{"prompt": "p \U0001f600"}],
    }
    for name, rows in lines.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "corpus").mkdir()
    (root / "corpus/a.txt").write_text("one\n\n<|endoftext|>\ntwo \u2581 three")
    return root


EXPECTED = {
    "corpus": ["one\n", "two \u2581 three"],
    "demonstrations": [Demonstration("p", "r\u00e9\n\n")]
    + [Demonstration(f"p{i}", f"r{i}") for i in range(50)],
    "rankings": [
        Ranking("p", ("a", "b", ""), (2, 1, 1), (True, True, True), None),
        Ranking("q", ("a", "b"), (1, 2), (False, True), "ann"),
    ],
    "comparisons": [Ranking("p", ("c", ""), (1, 2), (True, True), None)],
    "prompts": [Prompt("p \U0001f600")],
}


@pytest.mark.parametrize("kind", sorted(EXPECTED))
def test_records_come_back_whole_and_in_order(data, tmp_path, kind, capfd):
    for _ in range(2):  # prepared, then from the cache
        records = load(kind, data, (f"{kind}/*",), "train", tmp_path / "cache")
        assert list(records) == EXPECTED[kind]
        assert len(records) == len(EXPECTED[kind])
        assert records[-1] == EXPECTED[kind][-1]
        assert records[:2] == EXPECTED[kind][:2]
        with pytest.raises(IndexError):
            records[len(records)]
    assert capfd.readouterr() == ("", "")


def test_the_cache_is_named_by_content_not_by_name_or_time(data, tmp_path):
    cache = tmp_path / "cache"
    load("prompts", data, ("prompts/*",), "train", cache)
    (first,) = cache.iterdir()
    stamp = first.stat().st_mtime_ns
    (data / "prompts/a.jsonl").rename(data / "prompts/z.jsonl")
    load("prompts", data, ("prompts/*",), "train", cache)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [stamp]
    (data / "prompts/z.jsonl").write_text('{"prompt": "new"}')
    assert list(load("prompts", data, ("prompts/*",), "train", cache)) == [
        Prompt("new")
    ]
    assert len(list(cache.iterdir())) == 2


def test_the_same_content_in_two_splits_is_kept_apart(data, tmp_path):
    copy = (data / "prompts/a.jsonl").read_bytes()
    (data / "prompts/a_valid.jsonl").write_bytes(copy)
    for split in ("train", "valid"):
        records = load("prompts", data, ("prompts/*",), split, tmp_path / "cache")
        assert list(records) == EXPECTED["prompts"]


def test_bad_input_leaves_nothing_in_the_cache(data, tmp_path):
    with (data / "demonstrations/b.jsonl").open("a") as file:
        file.write('{"prompt": "p"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:51: field 'response': is missing"):
        load("demonstrations", data, ("demonstrations/*",), "train", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_records_is_named(data, tmp_path, content):
    (data / "prompts/empty.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no record"):
        load("prompts", data, ("prompts/*",), "train", tmp_path / "cache")


def test_interrupted_preparation_is_not_trusted(data, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    write = builders.write_records

    def interrupted(directory, kind, split, examples):
        write(directory, kind, split, [next(examples)])
        raise KeyboardInterrupt

    monkeypatch.setattr(builders, "write_records", interrupted)
    arguments = ("demonstrations", data, ("demonstrations/*",), "train", cache)
    with pytest.raises(KeyboardInterrupt):
        load(*arguments)
    assert list(cache.iterdir()) == []
    # What a killed process leaves behind: a directory without the final name.
    monkeypatch.undo()
    builders.write_records(
        cache / ".unfinished-x",
        "demonstrations",
        "train",
        [{"prompt": "p"} | {"response": "r"}],
    )
    assert list(load(*arguments)) == EXPECTED["demonstrations"]


def test_the_loser_of_a_race_uses_the_records_of_the_winner(
    data, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    write = builders.write_records
    arguments = ("rankings", data, ("rankings/*",), "train", cache)

    def overtaken(*args):
        monkeypatch.undo()
        load(*arguments)  # another process is done while this one writes
        write(*args)

    monkeypatch.setattr(builders, "write_records", overtaken)
    assert list(load(*arguments)) == EXPECTED["rankings"]
    assert len(list(cache.iterdir())) == 1


def test_two_processes_prepare_at_once_silently_and_without_tensorflow(data, tmp_path):
    program = (
        "import sys\n"
        "from rlhf_jax.data import batches, prompts, sources, tokenizer\n"
        "slow = {'tensorflow_datasets', 'grain', 'sentencepiece', 'array_record'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
        "records = sources.load('demonstrations', sys.argv[1], ('demonstrations/*',),"
        " 'train', sys.argv[2])\n"
        "assert 'tensorflow' not in sys.modules\n"
        "assert len(records) == 51 and records[50].prompt == 'p49'\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, data, tmp_path / "cache"]

    def run(_):
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)

    with ThreadPoolExecutor() as pool:
        for result in pool.map(run, range(2)):
            assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def damage_records(directory):
    (path,) = directory.rglob("*.array_record*")
    path.write_bytes(path.read_bytes()[:-10])


def damage_delete(directory):
    (path,) = directory.rglob("*.array_record*")
    path.unlink()


def damage_info(directory):
    next(directory.rglob("dataset_info.json")).unlink()


def damage_manifest(directory):
    (directory / "sizes.json").write_text("{")


@pytest.mark.parametrize(
    "damage", [damage_records, damage_delete, damage_info, damage_manifest]
)
def test_a_damaged_cache_says_what_to_delete(data, tmp_path, damage):
    arguments = ("prompts", data, ("prompts/*",), "train", tmp_path / "cache")
    load(*arguments)
    (directory,) = (tmp_path / "cache").iterdir()
    damage(directory)
    with pytest.raises(DataError) as caught:
        load(*arguments)
    assert str(caught.value).startswith(f"{directory}: ")
    assert "Delete this directory" in str(caught.value)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_files_are_split_by_the_end_of_their_stem_and_sorted(tmp_path):
    touch(
        tmp_path,
        *("a/x_train1.txt.gz", "a/invalid_x.txt", "a/x.y_valid.txt.gz", "a/x_test.txt"),
        *("a/test.txt", "a/x_valid_test.txt", "a/b.txt", "a/contest.txt"),
    )

    def names(split):
        return [p.name for p in sources.find_files(tmp_path, ("a/*", "a/b*"), split)]

    assert names("train") == [
        "b.txt",
        "contest.txt",
        "invalid_x.txt",
        "x_train1.txt.gz",
    ]
    assert names("valid") == ["x.y_valid.txt.gz"]
    assert names("test") == ["test.txt", "x_test.txt", "x_valid_test.txt"]


@pytest.mark.parametrize(
    "name",
    [
        *("x_Test.jsonl", "x.valid.jsonl.gz", "dev-0.jsonl", "x_validation.jsonl"),
        *("held_out.jsonl", "x_eval2.jsonl", "Test/part-0.jsonl"),
        *("x_holdout.jsonl", "hold-out.jsonl", "held-out/x.jsonl", "testset.jsonl"),
        *("x_testing.jsonl", "evaluation.jsonl", "x_validate.jsonl", "evals/x.jsonl"),
    ],
)
def test_what_another_style_of_name_holds_out_is_not_trained_on(tmp_path, name):
    others = ("dev_train0.jsonl", "latest.jsonl", "test_train.jsonl")
    touch(tmp_path, name, *others, "y_test.jsonl")
    with pytest.raises(DataError, match=f"{name}: would be trained on, though"):
        sources.find_files(tmp_path, ("*", "*/*"), "train")
    found = sources.find_files(tmp_path, others, "train")
    assert [path.name for path in found] == list(others)
    found = sources.find_files(tmp_path, ("*",), "test")
    assert [path.name for path in found] == ["y_test.jsonl"]


def test_held_out_prompts_that_are_trained_on_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    fields = {
        "demonstrations": {"response": "r"},
        "rankings": {"responses": ["r", "s"], "ranks": [1, 2]},
        "comparisons": {"chosen": "r", "rejected": "s"},
    }

    def write(name, *prompts):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        more = fields.get(path.parent.name, {})
        lines = (json.dumps({"prompt": p} | more) + "\n" for p in prompts)
        path.write_text("".join(lines))

    write("demonstrations/x_train", "a", "b", "c")
    write("demonstrations/x_valid", "d", "e")
    write("rankings/x_train", "a", "f")
    write("rankings/x_valid", "b", "g")
    write("comparisons/x_test", "f", "h", "i")
    write("prompts/ppo", "j", "k")
    write("prompts/rank_train", "b", "m")  # nobody ranks them: there are rankings
    write("prompts/eval_test", "l", "k", "m", "c")
    inputs = Inputs(tmp_path, FilesConfig(), SimulationConfig(), tmp_path / "run")
    told = "\n".join(inputs.shared_prompts())
    assert "1 of 3 prompts of comparisons (test) are in rankings (train) too" in told
    assert "1 of 4 prompts of eval_prompts (test) are in demonstrations (tr" in told
    assert "1 of 4 prompts of eval_prompts (test) are in ppo_prompts (train)" in told
    assert told.count("too: what is measured") == 3


def test_copies_that_programs_leave_beside_a_file_are_not_data(tmp_path, monkeypatch):
    """A copy of a held-out file under another name would be trained on."""
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    lines = '{"prompt": "p", "response": "r"}\n'
    for name, text in (("corpus/x", "t"), ("demonstrations/x", lines)):
        end = ".txt" if name[0] == "c" else ".jsonl"
        touch(tmp_path, f"{name}_train{end}")
        kept = (tmp_path / name).with_name(f"x_valid{end}")
        for path in (f"x_train{end}", kept.name, f"{kept.name}.bak", f"{kept.name}~"):
            kept.with_name(path).write_text(text)
        kept.with_name(f".unfinished-1-x_train{end}").write_text(text)
    inputs = Inputs(tmp_path, FilesConfig(), SimulationConfig(), tmp_path / "run")
    for purpose in ("corpus", "demonstrations"):
        for split in ("train", "valid"):
            assert len(inputs.read(purpose, split)) == 1


def test_a_file_beside_its_compressed_copy_is_not_read_twice(tmp_path):
    touch(tmp_path, "a/x.jsonl", "a/x.jsonl.gz")
    with pytest.raises(DataError, match=r"x\.jsonl: is there with and without \.gz"):
        sources.find_files(tmp_path, ("a/*.jsonl", "a/*.gz"), "train")


def test_a_file_goes_by_its_name_and_not_by_what_that_matches(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts").mkdir()
    names = [f"prompts/human{x}_ppo.jsonl" for x in ("1", "[12]")]
    for name in names:
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n")
    inputs = Inputs(tmp_path, FilesConfig(), SimulationConfig(), tmp_path / "run")
    found = inputs.read_by_file("ppo_prompts", "train")
    assert {name: list(prompts) for name, prompts in found.items()} == {
        name: [Prompt(name)] for name in names
    }


def test_the_splits_of_a_tfds_dataset_have_names_of_their_own(tmp_path, monkeypatch):
    """Under one name the last split's numbers took the others' place."""
    files = FilesConfig(rankings=("tfds:mine",))
    inputs = Inputs(tmp_path, files, SimulationConfig(), tmp_path / "run")
    monkeypatch.setattr(inputs, "read", lambda purpose, split: [])
    found = [inputs.read_by_file("rankings", s) for s in records.SPLITS]
    assert len({name for names in found for name in names}) == 3


def test_an_empty_match_says_what_is_there(tmp_path):
    touch(tmp_path, "a/x_valid.jsonl", "b/y.txt")
    with pytest.raises(DataError) as caught:
        sources.find_files(tmp_path, ("a/*.jsonl", "c/*"), "train")
    for words in (str(tmp_path), "a/*.jsonl, c/*", "'train'", "a/x_valid.jsonl"):
        assert words in str(caught.value)
    with pytest.raises(DataError, match=r"There: a/x_valid\.jsonl, b/y\.txt"):
        sources.find_files(tmp_path, ("c/*",), "train")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="There: nothing"):
        sources.find_files(tmp_path / "void", ("c/*",), "train")
    with pytest.raises(DataError, match="no such directory"):
        sources.find_files(tmp_path / "absent", ("c/*",), "train")


@pytest.mark.parametrize("pattern", ["../*", "a/../../x", "/etc/*", ""])
def test_a_pattern_may_not_leave_the_root(tmp_path, pattern):
    with pytest.raises(DataError, match="not a path below the data directory"):
        sources.find_files(tmp_path, (pattern,), "train")


def test_a_link_may_not_leave_the_root(tmp_path):
    touch(tmp_path, "secret.txt", "root/here.txt")
    root = tmp_path / "root"
    (root / "inside.txt").symlink_to(root / "here.txt")
    found = sources.find_files(root, ("*.txt",), "train")
    assert [path.name for path in found] == ["here.txt", "inside.txt"]
    (root / "outside.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DataError, match=r"outside\.txt: is a link to .*secret\.txt"):
        sources.find_files(root, ("*.txt",), "train")


def test_a_single_text_is_not_a_tuple_of_patterns(tmp_path):
    with pytest.raises(TypeError, match="tuple of globs"):
        sources.find_files(tmp_path, "corpus/*", "train")


def test_an_unknown_kind_names_the_valid_ones(tmp_path):
    with pytest.raises(ValueError, match="corpus, demonstrations"):
        load("demos", tmp_path, ("*",), "train", tmp_path)  # type: ignore[arg-type]


def test_a_tfds_dataset_is_read_by_name(tmp_path):
    rows = [{"prompt": "p", "response": "r"}, {"prompt": "q", "response": "\0"}]
    builders.write_records(tmp_path, "demonstrations", "validation", rows)  # type: ignore
    records = load("demonstrations", tmp_path, ("tfds:rlhf_text",), "valid", tmp_path)
    assert records[0] == Demonstration("p", "r")
    with pytest.raises(DataError, match=r"rlhf_text:1: field 'response': .*U\+0000"):
        records[1]
    prompts = load("prompts", tmp_path, ("tfds:rlhf_text/1.0.0",), "valid", tmp_path)
    assert prompts[1] == Prompt("q")
    for kind, patterns, split, words in [
        ("demonstrations", ("tfds:rlhf_text",), "train", "no split train; it has vali"),
        ("rankings", ("tfds:rlhf_text",), "valid", "field 'ranks': is missing"),
        ("prompts", ("tfds:absent",), "valid", "must name one prepared dataset, found"),
        ("prompts", ("tfds:rlhf_text", "a/*"), "valid", "stands alone"),
        ("prompts", ("tfds:../rlhf_text",), "valid", "not a path below"),
    ]:
        with pytest.raises(DataError, match=words):
            load(kind, tmp_path, patterns, split, tmp_path)  # type: ignore[arg-type]


def test_a_tfds_dataset_is_known_by_its_content(tmp_path):
    """Not by where it lies; what is wrong in it is found when a run begins."""

    def inputs(root: Path, response: str) -> Inputs:
        rows = [{"prompt": "p", "response": response}]
        builders.write_records(root, "demonstrations", "train", rows)  # type: ignore
        files = FilesConfig(demonstrations=("tfds:rlhf_text",))
        return Inputs(root, files, SimulationConfig(), tmp_path / "run")

    source = ("demonstrations", "train")
    roots = [tmp_path / name for name in "abcd"]
    one, same, other = map(inputs, roots, ("r", "r", "s"))
    assert one.fingerprint(source) == same.fingerprint(source)
    assert one.fingerprint(source) != other.fingerprint(source)
    one.check([source])
    with pytest.raises(DataError, match="rlhf_text:0: field 'response': "):
        inputs(roots[3], "\0").check([source])


def test_a_damaged_block_of_records_names_its_directory(data, tmp_path):
    arguments = ("demonstrations", data, ("demonstrations/*",), "train", tmp_path / "c")
    load(*arguments)
    (path,) = (tmp_path / "c").rglob("*array_record*")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[:middle] = bytes(middle)
    path.write_bytes(content)
    for read in (lambda: list(load(*arguments)), lambda: load(*arguments)[0]):
        with pytest.raises(DataError, match="damaged .*delete it and run again"):
            read()


def test_a_run_of_another_version_says_what_to_delete(tmp_path):
    small = SimulationConfig(num_documents=20, num_valid_documents=5)
    Inputs(None, FilesConfig(), small, tmp_path)
    path = tmp_path / "data" / "simulation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    with pytest.raises(DataError, match="delete the directory"):
        Inputs(None, FilesConfig(), small, tmp_path)


def test_a_simulation_that_cannot_be_written_is_told_by_its_field(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(simulation_campaign, "MAX_REDRAWS", 5)
    many = SimulationConfig(num_documents=1, num_eval_prompts=30_000)
    with pytest.raises(DataError, match="simulation: .* ask for fewer prompts"):
        Inputs(None, FilesConfig(), many, tmp_path)


def test_a_run_of_another_simulation_names_only_what_differs(tmp_path):
    small = SimulationConfig(num_documents=20, num_valid_documents=5)
    Inputs(None, FilesConfig(), small, tmp_path)
    other = dataclasses.replace(small, num_eval_prompts=13)
    with pytest.raises(DataError, match="--run") as told:
        Inputs(None, FilesConfig(), other, tmp_path)
    assert "(num_eval_prompts 300 there, 13 now)" in str(told.value)


def test_held_out_demonstrations_that_are_trained_on_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "demonstrations").mkdir()
    for split in ("train", "valid"):
        path = tmp_path / f"demonstrations/x_{split}.jsonl"
        path.write_text('{"prompt": "p", "response": "r"}\n')
    inputs = Inputs(tmp_path, FilesConfig(), SimulationConfig(), tmp_path / "run")
    (line,) = inputs.shared_prompts()
    assert "1 of 1 prompts of demonstrations (valid) are in demonstrations (tr" in line
