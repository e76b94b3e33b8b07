"""The demo's retrieval set, made of a small package like openmoji's."""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nvmm.data.prepare import mbeir, openmoji, openmoji_tasks
from nvmm.data.prepare.openmoji_set import Settings, build, write_set
from nvmm.data.prepare.openmoji_tasks import DATASET, MODALITIES

ZWJ = "-200D-"
FLAGS = openmoji.MOST_NAMES + 1
SPLITS = tuple(openmoji.SPLITS)


def draw(svg: Path, *, size: int) -> bytes | None:
    """A picture of one colour, that of the file's text; none of the text "broken"."""
    text = svg.read_text()
    if text == "broken":
        return None
    colour = tuple(hashlib.sha256(text.encode()).digest()[:3])
    stream = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(stream, "PNG")
    return stream.getvalue()


def make_package(folder: Path) -> Path:
    """A package of hands in six tones, cooks, two brains, flags, and things to fill the splits."""
    lines: list[dict[str, Any]] = []

    def add(
        code: str, name: str, subgroup: str, color: str = "", black: str = "", **more: Any
    ) -> None:
        line = {
            "hexcode": code,
            "annotation": name,
            "subgroups": subgroup,
            "tags": "",
            "skintone": "",
        }
        line |= {"openmoji_tags": "", "skintone_base_hexcode": ""}
        lines.append(line | more)
        for style, text in (("color", color), ("black", black)):
            path = folder / style / "svg" / f"{code}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text or f"{style} {code}")

    for hand in range(8):
        base, name = f"1F4{hand}0", f"hand {hand}"
        add(base, name, "hands", tags="wave, hello, hi, bye, more")
        for tone in range(1, 6):
            add(
                f"{base}-1F3F{tone}",
                f"{name}: {openmoji.TONES[tone]}",
                "hands",
                skintone=tone,
                skintone_base_hexcode=base,
            )
        add(f"{base}-AA", f"{name}: two", "hands", skintone="1,2", skintone_base_hexcode=base)
    for who, code in (("man", "1F468"), ("woman", "1F469"), ("person", "1F9D1")):
        shared = "" if who == "woman" else "a cook"
        add(f"{code}{ZWJ}1F373", f"{who} cook", "roles", color=shared)
    add("1F9E0", "brain", "things")
    add("E123", "brain", "things")
    for number in range(FLAGS):
        add(f"F{number}", f"flag {number}", "flags", black="the flag")
    for number in range(30):
        add(f"1F6{number:02d}", f"thing {number}", "things")
    add("1F999", "no drawing", "things", color="broken", black="broken")
    (folder / "data").mkdir()
    (folder / "data/openmoji.json").write_text(json.dumps(lines))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openmoji")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openmoji, "rasterise", draw)
        write_set(make_package(folder / "package"), folder, Settings(size=8), processes=1)
    return folder


def pool(made: Path, split: str) -> dict[str, mbeir.Item]:
    return mbeir.read_pool(made / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl")


def queries(made: Path, split: str, task: int) -> dict[str, mbeir.Query]:
    return mbeir.read_queries(made / f"query/{split}/mbeir_openmoji_task{task}_{split}.jsonl")


def everywhere(made: Path, task: int) -> list[tuple[mbeir.Query, list[str], list[str]]]:
    """Each query of a task with what its positives and negatives are: texts or paths."""
    found = []
    for split in SPLITS:
        items = {did: item.text or str(item.image) for did, item in pool(made, split).items()}
        for query in queries(made, split, task).values():
            lists = (query.positives, query.negatives)
            found.append((query, *([items[did] for did in dids] for dids in lists)))
    return found


def test_no_concept_is_in_two_splits(made: Path) -> None:
    split_of: dict[Any, set[str]] = defaultdict(set)
    for split in SPLITS:
        for item in pool(made, split).values():
            name = item.text.partition(":")[0].rstrip(".").lower()
            for word in ("man ", "woman ", "person "):
                name = name.removeprefix(word)
            split_of[name or item.image].add(split)
    assert all(len(splits) == 1 for splits in split_of.values())
    assert {"hand 0", "cook", "brain", "thing 29"} <= set(split_of)
    [cooks] = split_of["cook"]
    texts = {item.text for item in pool(made, cooks).values()}
    assert {"Man cook.", "Woman cook.", "Person cook."} <= texts


def test_pools_and_left_out_pictures(made: Path) -> None:
    all_of = [item for split in SPLITS for item in pool(made, split).values()]
    images = [item.image for item in all_of if item.image]
    assert len(images) == len(set(images)) and all((made / path).is_file() for path in images)
    # 48 hands and 8 in black; 2 + 3 cooks; brains, flags in colour, things.
    assert len(images) == 48 + 8 + 5 + 4 + FLAGS + 2 * 30
    texts = [item.text for item in all_of if item.text]
    assert len(texts) == len(set(texts)) == 48 + 3 + 1 + FLAGS + 30
    assert "Hand 0: wave, hello, hi, bye." in texts, "four tags"
    assert "Hand 0: dark skin tone: wave, hello, hi, bye." in texts, "the base's tags"
    assert not any("two" in text or "no drawing" in text for text in texts)
    card = (made / "README.md").read_text()
    assert "color/svg/1F999.svg" in card and "CC BY-SA 4.0" in card
    for split in SPLITS:
        for task, (_, target) in MODALITIES.items():
            name = f"mbeir_openmoji_task{task}_{split}_cand_pool.jsonl"
            local = mbeir.read_pool(made / "cand_pool/local" / name)
            union = pool(made, split)
            assert local == {did: i for did, i in union.items() if i.modality == target}


def test_positives_are_all_that_answer(made: Path) -> None:
    by_text = {query.text: positives for query, positives, _ in everywhere(made, 0)}
    assert len(by_text["Brain."]) == 4, "two emoji of one name, two styles"
    assert by_text["Man cook."] != by_text["Woman cook."]
    assert set(by_text["Man cook."]) & set(by_text["Person cook."]), "one picture, two names"
    by_picture = {query.image: positives for query, positives, _ in everywhere(made, 3)}
    cook = f"images/color/1F468{ZWJ}1F373.png"
    assert set(by_picture[cook]) == {"Man cook.", "Person cook."}
    for query, positives, negatives in everywhere(made, 4):
        assert query.image not in positives and query.image in negatives
    hand = "images/color/1F400-1F35.png".replace("1F35", "1F3F5")
    [tones] = [positives for query, positives, _ in everywhere(made, 4) if query.image == hand]
    styles = {f"images/color/1F400-1F3F{tone}.png" for tone in range(1, 5)}
    assert set(tones) == styles | {"images/color/1F400.png", "images/black/1F400.png"}


def test_changes_ask_for_what_their_positive_is(made: Path) -> None:
    texts = defaultdict(int)
    for query, positives, negatives in everywhere(made, 7):
        texts[query.text] += 1
        assert query.image in negatives and query.image not in positives
        if query.text == "The same in black and white.":
            assert all(path.startswith("images/black/") for path in positives)
            continue
        tone = openmoji.TONES.index(query.text.removeprefix("The same with ").rstrip("."))
        [path] = positives
        base, _, code = Path(path).stem.partition("-1F3F")
        assert (int(code) if code else 0) == tone
        others = [negative for negative in negatives if Path(negative).stem.startswith(base)]
        assert len(others) >= 5, "the other tones"
    assert texts["The same with dark skin tone."] == 8 == texts["The same with no skin tone."]
    assert texts["The same in black and white."] == 8 + 3 + 1 + 30


@pytest.mark.parametrize("task", sorted(MODALITIES))
def test_negatives_are_wrong_and_near(made: Path, task: int) -> None:
    checked = everywhere(made, task)
    assert checked
    for query, positives, negatives in checked:
        assert not set(positives) & set(negatives) and len(set(negatives)) == len(negatives)
        if task == 0 and query.text.startswith("Hand"):
            own = Path(positives[0]).stem.partition("-1F3F")[0]
            codes = [Path(negative).stem for negative in negatives]
            assert all(code.startswith("1F4") for code in codes), "hands are the siblings"
            assert sum(code.startswith(own) for code in codes) >= 5, "the other tones"
    if task == 0:
        siblings = {q.text: negatives for q, _, negatives in checked if "Thing" in q.text}
        assert any(siblings.values())
        for text, negatives in siblings.items():
            codes = {Path(negative).stem for negative in negatives}
            assert codes <= {"1F9E0", "E123", *(f"1F6{i:02d}" for i in range(30))}
            assert f"1F6{int(text.rstrip('.').split()[1]):02d}" not in codes


def test_judgements_and_instructions_fit_the_queries(made: Path) -> None:
    prompts = mbeir.read_instructions(made / "instructions/query_instructions.tsv")
    assert all(len(set(texts)) == 4 for texts in prompts.values())
    for split in SPLITS:
        union = mbeir.read_queries(made / f"query/{split}/mbeir_union_{split}.jsonl")
        listed = {}
        for task, (asked, target) in MODALITIES.items():
            each = queries(made, split, task)
            listed |= each
            qrels = made / f"qrels/{split}/mbeir_openmoji_task{task}_{split}_qrels.txt"
            assert {q: set(d) for q, d in mbeir.read_qrels(qrels).items()} == {
                name: set(query.positives) for name, query in each.items()
            }
            assert {line.split()[4] for line in qrels.read_text().splitlines()} <= {str(task)}
            for name, query in each.items():
                assert name.startswith(f"{DATASET}:") and query.modality == asked
                mbeir.instruction(prompts, name, asked, target, 1)
        assert union == listed


def test_random_negatives_become_samples(made: Path) -> None:
    lines = (made / "negatives/random.jsonl").read_text().splitlines()
    given = {line["query_id"]: line["ids"] for line in map(json.loads, lines)}
    union = mbeir.read_queries(made / "query/train/mbeir_union_train.jsonl")
    candidates = pool(made, "train")
    assert given.keys() == union.keys()
    assert all(not set(ids) & set(union[name].positives) for name, ids in given.items())
    drawn = [candidates[did].modality for ids in given.values() for did in ids]
    share = sum(item.modality == "text" for item in candidates.values()) / len(candidates)
    assert abs(drawn.count("text") / len(drawn) - share) < 0.1, "drawn from the whole pool"
    prompts = mbeir.read_instructions(made / "instructions/query_instructions.tsv")
    samples = list(mbeir.samples(union, candidates, prompts, made, num_negatives=1, mined=given))
    assert len(samples) == len(union)
    records = [json.loads(sample["json"]) for sample in samples]
    assert all(len(record["negatives"]) == 1 for record in records)


def test_same_bytes_again_and_only_once(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openmoji, "rasterise", draw)
    monkeypatch.setattr(openmoji, "fetch", lambda *_: made / "package")
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert build(tmp_path, Settings(size=8)) and not build(tmp_path, Settings(size=8))
    for path in made.rglob("*.*"):
        if "package" not in path.parts and path.is_file():
            assert (tmp_path / path.relative_to(made)).read_bytes() == path.read_bytes(), path
    assert build(tmp_path, Settings(size=8, seed=2)), "another seed is another set"


def test_packages_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.tgz").write_bytes(b"no package")
    with pytest.raises(ValueError, match=f"{openmoji.SHA256}: remove it"):
        openmoji.fetch(tmp_path, tmp_path / "other.tgz")
    with pytest.raises(ValueError, match=r"gone\.tgz is not a file"):
        openmoji.fetch(tmp_path, tmp_path / "gone.tgz")
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ValueError, match="apt-get install npm"):
        openmoji.fetch(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/openmoji.json").write_text('[{"hexcode": "1"}]')
    with pytest.raises(ValueError, match=r"data/openmoji\.json is no openmoji\.json"):
        openmoji.read(tmp_path)


def test_svg_files_are_drawn_on_white(tmp_path: Path) -> None:
    try:
        import cairosvg  # noqa: F401
    except (ImportError, OSError):
        pytest.skip("the extra demo and libcairo are not there")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2">{}</svg>'
    path = tmp_path / "a.svg"
    path.write_text(svg.format('<rect width="1" height="2" fill="#ff0000"/>'))
    data = openmoji.rasterise(path, size=8)
    assert data is not None
    image = Image.open(io.BytesIO(data)).convert("RGB")
    assert image.size == (8, 8)
    assert image.getpixel((0, 4)) == (255, 0, 0) and image.getpixel((7, 4)) == (255, 255, 255)
    path.write_text("<svg")
    assert openmoji.rasterise(path, size=8) is None
    with pytest.raises(ValueError, match=r"gone\.svg cannot be read"):
        openmoji.rasterise(tmp_path / "gone.svg", size=8)


def test_instructions_are_of_every_task() -> None:
    assert openmoji_tasks.INSTRUCTIONS.keys() == MODALITIES.keys()
