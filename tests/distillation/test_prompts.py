"""Sources of prompts, and the mapped file that they end in."""

import json

import pytest

from diffusers_wadi.distillation import PromptStore, prompt_store, write_prompts
from diffusers_wadi.distillation.prompts import Unreadable, read_dataset, read_file


@pytest.fixture
def kept(tmp_path):
    """Write `content` into a file called `name` and read the prompts of it back from a store."""

    def run(name: str, content: str | bytes, column=None, **options) -> PromptStore:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return write_prompts(tmp_path / "prompts.bin", read_file(tmp_path / name, column), name, **options)

    return run


JOURNEYDB = [
    {"img_path": "a.jpg", "prompt": "not this --v 5", "Task2": {"Caption": " a cat "}, "Task3": {}},
    {"Task2": {"Caption:": "a dog"}},
    {"Task2": {"caption": "a cow", "Answer": "x"}},
]
TEXTS = ["ein Bär", 'a, "quoted"\nline', "", "a dog", "ein Bär", "\u3042"]
EXPECTED = ["ein Bär", 'a, "quoted"\nline', "a dog", "\u3042"]
FILES = {
    "txt": ("p.txt", "a cat\r\n\n  a dog \na cat\nein Bär", None, ["a cat", "a dog", "ein Bär"]),
    "txt with a mark": ("p.txt", "\ufeffa cat\na cat", None, ["a cat"]),
    "txt, odd line ends": ("p.txt", "one\u2028line\nanother", None, ["one\u2028line", "another"]),
    "json texts": ("p.json", json.dumps(TEXTS), None, EXPECTED),
    "json objects": ("p.json", json.dumps([{"t": text, "n": 1} for text in TEXTS]), "t", EXPECTED),
    "jsonl texts": ("p.jsonl", "\n".join(json.dumps(text) for text in TEXTS), None, EXPECTED),
    "jsonl objects": ("p.jsonl", "\n".join(json.dumps({"n": 1, "t": t}) for t in TEXTS), "t", EXPECTED),
    "journeydb": ("train_anno.jsonl", "\n".join(map(json.dumps, JOURNEYDB)), None, ["a cat", "a dog", "a cow"]),
    "journeydb's own prompts": ("p.jsonl", json.dumps(JOURNEYDB[0]), "prompt", ["not this --v 5"]),
    "csv": ("p.csv", 'n,t\n1,ein Bär\n2,"a, ""quoted""\nline"\n3,\n4,a dog\n5,ein Bär\n6,\u3042\n', "t", EXPECTED),
    "csv of one column": ("p.csv", "t\nein Bär\n\na dog\n", None, ["ein Bär", "a dog"]),
}


@pytest.mark.parametrize("name, content, column, expected", FILES.values(), ids=FILES)
def test_files_are_read(kept, name, content, column, expected):
    store = kept(name, content, column)
    assert list(store) == expected and len(store) == len(expected)
    assert store.report.unreadable == 0 and store.report.kept == len(expected)


def test_parquet_is_read(kept, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"t": [*TEXTS, None], "n": range(7)})
    parquet.write_table(table, tmp_path / "written.parquet")
    content = (tmp_path / "written.parquet").read_bytes()
    store = kept("p.parquet", content, "t")
    assert list(store) == EXPECTED and store.report.empty == 2
    with pytest.raises(ValueError, match="no column 'caption', only t, n"):
        kept("p.parquet", content, "caption")
    with pytest.raises(ValueError, match="row 1: is int, expected text"):
        kept("p.parquet", content, "n")


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_are_read(tmp_path, monkeypatch, streaming):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps({"t": t, "n": 1}) for t in TEXTS))
    store = write_prompts(
        tmp_path / "prompts.bin", read_dataset(str(tmp_path / "set"), column="t", streaming=streaming), "set"
    )
    assert list(store) == EXPECTED
    with pytest.raises(ValueError, match="no column 'caption', only (t, n|n, t)"):
        read_dataset(str(tmp_path / "set"), column="caption", streaming=streaming)


REFUSED = {
    "suffix": ("p.xls", "a", None, "ends in '.xls', expected one of .txt, .json"),
    "only blanks": ("p.txt", "\n \n", None, "holds no prompt: 2 records, 2 of them empty"),
    "nothing at all": ("p.txt", "", None, "holds no prompt: 0 records"),
    "empty csv": ("p.csv", "", "t", "no column 't'"),
    "broken json": ("p.json", "{", None, "not valid JSON"),
    "json of another kind": ("p.json", '{"a": 1}', None, "one dict, expected a list"),
    "numbers": ("p.json", '["a", 1]', None, "1 of 2 records .* entry 2: is int, expected text"),
    "no column chosen": ("p.csv", "a,b\n1,2\n", None, "has the columns a, b: choose one with --caption_column"),
    "column not there": ("p.csv", "a,b\n1,2\n", "c", "no column 'c', only a, b"),
    "key not there": ("p.jsonl", '{"a": 1, "b": 2}', "c", "line 1: has no 'c' .* only a, b"),
    "objects without a key": ("p.jsonl", '{"a": "x"}', None, "line 1: has a, not JourneyDB's Task2: choose"),
    "another annotation": ("p.jsonl", '{"Task2": {"Style": "x"}}', None, "line 1: begins Task2 with 'Style'"),
    "columns of plain text": ("p.txt", "a", "t", "plain text without columns"),
    "half a character": ("p.json", '["\\ud83d"]', None, "record 1: is not Unicode text"),
}


@pytest.mark.parametrize("name, content, column, message", REFUSED.values(), ids=REFUSED)
def test_bad_files_are_refused(kept, tmp_path, name, content, column, message):
    with pytest.raises(ValueError, match=message):
        kept(name, content, column)
    assert not (tmp_path / "prompts.bin").exists()


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="nowhere.txt does not exist"):
        read_file("nowhere.txt")


BAD_LINES = {
    "jsonl": (
        "p.jsonl",
        b'"a"\n{"\n"b"\n"\xff"\n[]\n',
        "line 2: is not valid JSON.*line 4: is not UTF-8.*line 5: is list",
    ),
    "txt": (
        "p.txt",
        b"a\n\xff\nb\nc\xff\n",
        "2 of 4 records .* line 2: is not UTF-8 .* at byte 0.*line 4: is not UTF-8",
    ),
    "csv": ("p.csv", b"t,n\na,1\nx\n\xff,1\nb,1\n", "line 3: has 1 cells, the header has 2; line 4: is not UTF-8"),
}


@pytest.mark.parametrize("name, content, message", BAD_LINES.values(), ids=BAD_LINES)
def test_unreadable_records_are_counted_and_skipped_only_if_asked(kept, name, content, message):
    column = "t" if name.endswith("csv") else None
    with pytest.raises(ValueError, match=f"(?s){message}.*--skip_bad_lines"):
        kept(name, content, column)
    store = kept(name, content, column, skip_bad_lines=True)
    assert list(store) == ["a", "b"]
    assert store.report.unreadable >= 2 and "unreadable" in str(store.report)


def test_only_the_first_unreadable_ones_are_told(tmp_path):
    records = [Unreadable(f"line {i}", "bad") for i in range(9)]
    with pytest.raises(ValueError, match="9 of 9 records") as error:
        write_prompts(tmp_path / "p.bin", records, "x")
    assert "line 4" in str(error.value) and "line 5" not in str(error.value)
    with pytest.raises(
        ValueError, match="holds no prompt: 9 records, 0 of them empty and 9 unreadable .the first: line 0"
    ):
        write_prompts(tmp_path / "p.bin", records, "x", skip_bad_lines=True)


def test_repeated_prompts_are_kept_if_asked(tmp_path):
    store = write_prompts(tmp_path / "p.bin", ["aa", " ", "b", "aa "], "x", max_samples=3, keep_repeated=True)
    assert list(store) == ["aa", "b", "aa"]
    assert (store.report.duplicates, store.report.empty) == (0, 1)
    assert store.digest != write_prompts(tmp_path / "q.bin", ["aa", "b", "aa"], "x").digest


def test_report(tmp_path):
    store = write_prompts(tmp_path / "p.bin", ["aa", " ", "aa ", "\u3042" * 4, ""], "x")
    report = PromptStore(tmp_path / "p.bin").report
    assert report == store.report and report.lengths == {"mean": 3, "median": 3, "95 %": pytest.approx(3.9), "max": 4}
    assert str(report) == "2 prompts of 5 records, 2 empty, 1 repeated; characters: mean 3, median 3, 95 % 4, max 4"


def test_the_first_samples_only(tmp_path):
    """Different ones; and no more is read, since a stream may have no end."""

    def endless():
        yield from ["a", "a", "b"]
        yield "c"
        raise AssertionError("read on")

    assert list(write_prompts(tmp_path / "p.bin", endless(), "x", max_samples=3)) == ["a", "b", "c"]


def test_stores_are_sequences_and_know_their_contents(tmp_path):
    one = write_prompts(tmp_path / "one.bin", ["a", "bc", "d"], "x")
    other = write_prompts(tmp_path / "other.bin", ["ab", "c", "d"], "x")
    same = write_prompts(tmp_path / "same.bin", iter(["a", "a", "bc", "", "d"]), "y")
    assert one[-1] == "d" and one[1:] == ["bc", "d"] and one[:1] == ["a"] and "bc" in one
    with pytest.raises(IndexError):
        one[3]
    assert one.digest == same.digest != other.digest


def test_parts_of_a_store_are_refused(tmp_path):
    write_prompts(tmp_path / "p.bin", ["a", "b"], "x")
    whole = (tmp_path / "p.bin").read_bytes()
    for part in (b"", whole[:-3], b"something else"):
        (tmp_path / "part.bin").write_bytes(part)
        with pytest.raises(ValueError, match="not a file of prompts"):
            PromptStore(tmp_path / "part.bin")


def test_an_interrupted_reading_leaves_the_former_store(tmp_path):
    write_prompts(tmp_path / "p.bin", ["a"], "x")

    def broken():
        yield "b"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_prompts(tmp_path / "p.bin", broken(), "x")
    assert list(PromptStore(tmp_path / "p.bin")) == ["a"] and len(list(tmp_path.iterdir())) == 1


def test_texts_are_not_in_memory(tmp_path):
    """Of 20,000 prompts of 1 kB next to nothing is allocated after they are written, nor while they are read."""
    import tracemalloc

    texts = (f"{i} " + "x" * 1000 for i in range(20_000))
    tracemalloc.start()
    store = write_prompts(tmp_path / "p.bin", texts, "x")
    held, peak = tracemalloc.get_traced_memory()
    assert sum(len(store[i]) for i in range(0, 20_000, 7)) > 2_000_000
    assert tracemalloc.get_traced_memory()[0] < 200_000 and held < 200_000 and peak < 6_000_000
    tracemalloc.stop()
    assert prompt_store.PromptStore(tmp_path / "p.bin").digest == store.digest
