"""Image folders as they are found: links, names, levels, leftovers of systems."""

import errno
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from src.data.folders import list_class_folders, list_images
from src.data.sources import open_source
from src.data.subset import select_classes
from src.errors import UserError


def image(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, shade, shade)).save(path)


@pytest.fixture
def flowers(tmp_path):
    root = tmp_path / "flowers"
    for split in ("train", "val"):
        for name in ("daisy", "rose"):
            image(root / split / name / "1.png")
            image(root / split / name / "deep" / "2.png")
    return root


def labelled(root, split="train"):
    """Images by their paths below the split, with their classes."""
    source = open_source("imagefolder", str(root), split)
    start = len(str(root / split)) + 1
    names = [source.class_names[label] for label in source.labels]
    return [(source.describe(k)[start:], name) for k, name in enumerate(names)]


# links


@pytest.mark.parametrize(
    "link, target",
    [
        ("train/daisy/up", "../../train"),
        ("train/daisy/up", ".."),
        ("train/daisy/deep/here", "."),
        ("train/daisy/all", "../.."),
        ("train/daisy/other", "../rose"),
        ("train/daisy/other", "../rose/deep"),
        ("train/rose/deep/back", "../../daisy/deep"),
    ],
)
def test_a_link_that_leads_back_adds_no_image(flowers, link, target, caplog):
    expected = labelled(flowers)
    (flowers / link).symlink_to(target)
    assert labelled(flowers) == expected
    assert "did not follow links (1)" in caplog.text and link in caplog.text
    images, _ = list_images(flowers)
    assert len(images) == len({os.path.realpath(path) for path in images}) == 8


def test_a_loop_of_two_links_and_two_links_to_one_place(flowers, tmp_path):
    image(tmp_path / "elsewhere" / "3.png")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    for name in ("a", "b"):
        (flowers / "train" / "daisy" / name).symlink_to(tmp_path / "elsewhere")
    files = [file for file, _ in labelled(flowers)]
    assert files[:3] == ["daisy/1.png", "daisy/a/3.png", "daisy/deep/2.png"] and len(files) == 5


def test_links_that_lead_elsewhere_are_followed(flowers, tmp_path):
    (flowers / "train" / "daisy").rename(tmp_path / "away")
    (flowers / "train" / "daisy").symlink_to(tmp_path / "away")
    (tmp_path / "link").symlink_to(flowers)
    assert len(labelled(flowers)) == len(labelled(tmp_path / "link")) == 4
    assert len(list_images(tmp_path / "link")[0]) == 8


@pytest.mark.parametrize(
    "target, words",
    [
        ("daisy", "is the same folder as 'daisy'"),
        ("daisy/deep", "is a link into the class 'daisy'"),
        (".", "is a link to a folder that holds it"),
        ("..", "is a link to a folder that holds it"),
    ],
)
def test_a_class_folder_that_leads_back_is_refused(flowers, target, words):
    (flowers / "train" / "tulip").symlink_to(target)
    with pytest.raises(UserError, match=f"tulip: {words}"):
        labelled(flowers)


# levels


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_folder_level_too_many_is_named(flowers, split):
    (flowers / split).rename(flowers / "photos")
    (flowers / split).mkdir()
    (flowers / "photos").rename(flowers / split / "photos")
    words = rf'{split}: only one class \("photos"\).*did you mean .*{split}/photos\? .*'
    with pytest.raises(UserError, match=words + f"--data.{split}_folder {split}/photos"):
        labelled(flowers, split)
    folders = {f"{split}_folder": f"{split}/photos"}
    assert len(open_source("imagefolder", str(flowers), split, **folders)) == 4


@pytest.mark.parametrize("inner", ["photos/photos", "photos/set/photos"])
def test_several_folder_levels_too_many_are_named(flowers, inner):
    """Loose images, such as a preview, hide neither these levels nor the classes."""
    (flowers / "train").rename(flowers / "classes")
    place = flowers / "train" / inner
    place.parent.mkdir(parents=True)
    (flowers / "classes").rename(place)
    image(place / "preview.png")
    image(flowers / "train" / "photos" / "preview.png")
    words = rf"sub-folders \(daisy, rose\); did you mean .*{inner}\? Give --data.train_folder train"
    with pytest.raises(UserError, match=f"{words}/{inner}$"):
        labelled(flowers)


def test_one_class_with_folders_of_its_own_can_be_validated_on(flowers):
    for path in (flowers / "val" / "rose").rglob("*.png"):
        path.unlink()
    (flowers / "val" / "rose" / "deep").rmdir()
    (flowers / "val" / "rose").rmdir()
    image(flowers / "val" / "daisy" / "far" / "3.png")
    assert len(labelled(flowers, "val")) == 3


def test_a_lone_link_that_leads_back_is_followed_once(tmp_path):
    image(tmp_path / "train" / "photos" / "1.png")
    (tmp_path / "train" / "photos" / "again").symlink_to(".")
    assert labelled(tmp_path) == [("photos/1.png", "photos")]


def test_images_without_class_folders_and_a_folder_of_another_name(flowers):
    for path in sorted((flowers / "val").rglob("*.png")):
        path.rename(flowers / "val" / f"{path.parent.name}{path.name}")
    for name in ("daisy", "rose"):
        (flowers / "val" / name / "deep").rmdir()
        (flowers / "val" / name).rmdir()
    with pytest.raises(UserError, match=r"val: images \(3\), such as .*png, but no class folders"):
        labelled(flowers, "val")
    (flowers / "val").rename(flowers / "Test")
    with pytest.raises(UserError, match="did you mean --data.val_folder Test?"):
        labelled(flowers, "val")


@pytest.mark.parametrize(
    ("folders", "key"), [({"train_folder": "."}, "train"), ({"val_folder": "."}, "val")]
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_inside_the_other_is_refused(flowers, folders, key, split):
    """Its folder would be a class, and its images in both splits."""
    with pytest.raises(UserError, match=f"data.{key}_folder: .* contains the other split's folder"):
        open_source("imagefolder", str(flowers), split, **folders)


def test_a_folder_whose_name_begins_with_a_tilde(flowers, monkeypatch):
    """It stands for nobody's home."""
    monkeypatch.chdir(flowers.parent)
    flowers.rename("~photos")
    assert len(open_source("imagefolder", "~photos", "train")) > 0


# names


def test_names_that_differ_in_their_unicode_form_only_match(tmp_path):
    spelt = {form: unicodedata.normalize(form, "café") for form in ("NFC", "NFD")}
    for split, form in (("train", "NFD"), ("val", "NFC")):
        image(tmp_path / split / spelt[form] / "1.png")
        image(tmp_path / split / "bar" / "1.png")
    train, val = (open_source("imagefolder", str(tmp_path), split) for split in ("train", "val"))
    assert train.class_names == val.class_names == ("bar", spelt["NFD"])
    assert val.labels.tolist() == [0, 1]
    assert len(select_classes(val, [spelt["NFC"]])) == 1
    image(tmp_path / "val" / spelt["NFD"] / "1.png")
    with pytest.raises(UserError, match="spelled with other code points"):
        open_source("imagefolder", str(tmp_path), "val")


def test_what_systems_leave_behind_is_no_image(flowers, caplog):
    expected = labelled(flowers)
    caplog.set_level("INFO", "cvt")
    waste = ("@eaDir", "__MACOSX", "#recycle", "@Recycle", "#snapshot", "lost+found",
             "$Recycle.Bin", "System Volume Information")  # fmt: skip
    hidden = (".thumbnails", ".NET")
    for name in (*waste, *hidden):
        image(flowers / "train" / "daisy" / name / "1.png")
        image(flowers / "train" / "daisy" / "deep" / name / "1.png")
        image(flowers / "train" / name / "1.png")
    image(flowers / "train" / "daisy" / "._1.png")
    for name in ("@Recently-Snapshot", ".cache"):
        (flowers / "train" / name).mkdir()  # without images
    assert labelled(flowers) == expected
    left_out = [record.args[0] for record in caplog.records]
    # The first two hold copies only.
    ignored = (*waste[2:], *hidden)
    assert sorted(left_out) == sorted(str(flowers / "train" / name) for name in ignored)


def test_other_names_of_jpeg_and_webp_are_images(flowers):
    Image.new("RGB", (8, 6)).save(flowers / "train/daisy/3.jfif", "JPEG")
    Image.new("RGB", (8, 6)).save(flowers / "train/daisy/4.WEBP")
    assert ("daisy/3.jfif", "daisy") in labelled(flowers)
    assert ("daisy/4.WEBP", "daisy") in labelled(flowers)


def test_a_name_that_is_no_utf_8_is_read_and_counted(flowers):
    odd = os.fsdecode(os.fsencode(flowers / "train" / "daisy") + b"/caf\xe9.png")
    Image.new("RGB", (8, 6)).save(odd)
    for split in ("train", "val"):
        odder = os.fsdecode(os.fsencode(flowers / split) + b"/\xe9t\xe9")
        os.rename(flowers / split / "rose", odder)
    source = open_source("imagefolder", str(flowers), "train")
    assert len(source) == 5 and source.class_names == ("daisy", "\\xe9t\\xe9")
    assert source[1][0][:4].tobytes() == b"\x89PNG"
    assert source.digest() != open_source("imagefolder", str(flowers), "val").digest()


def test_the_checksum_of_a_moved_folder_stays(flowers, monkeypatch):
    before = open_source("imagefolder", str(flowers), "train")
    moved = flowers.rename(flowers.with_name("moved"))
    monkeypatch.chdir(moved.parent)
    for path in (str(moved), "moved", "./moved/", "moved/../moved"):
        after = open_source("imagefolder", path, "train")
        assert after.digest() == before.digest()
        assert after.subset([1, 0]).digest() == before.subset([1, 0]).digest() != before.digest()
    image = next((moved / "train/daisy").iterdir())
    image.rename(image.with_name(f"other{image.suffix}"))
    assert open_source("imagefolder", "moved", "train").digest() != before.digest()


# classes of the validation images


def test_a_validation_class_without_training_images_is_refused(flowers):
    image(flowers / "val" / "tulip" / "1.png")
    with pytest.raises(UserError, match="'tulip' is none of the 2 known classes"):
        labelled(flowers, "val")


def test_a_folder_that_cannot_be_read_is_named(flowers, monkeypatch):
    """Root may read any folder, so `os.scandir` fails in its place."""
    inner = flowers / "train/daisy/more"
    inner.mkdir()
    real = os.scandir

    def scandir(path):
        if str(path) == str(inner):
            raise PermissionError(errno.EACCES, "Permission denied", str(inner))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="daisy/more: Permission denied; make the folder readable"):
        open_source("imagefolder", str(flowers), "train")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_image(flowers):
    os.mkfifo(flowers / "train" / "daisy" / "pipe.jpg")
    images, others = list_images(flowers / "train")
    assert len(images) == 4 and [os.path.basename(path) for path in others] == ["pipe.jpg"]


def test_a_thousand_linked_classes_are_read_in_linear_time(tmp_path, monkeypatch):
    """ImageNet is often a folder of links; comparing each with each took minutes."""
    for number in range(100):
        (tmp_path / "real" / f"{number:03}").mkdir(parents=True)
        (tmp_path / "links").mkdir(exist_ok=True)
        (tmp_path / "links" / f"{number:03}").symlink_to(tmp_path / "real" / f"{number:03}")
    calls = []
    resolve = Path.resolve
    monkeypatch.setattr(Path, "resolve", lambda path: calls.append(path) or resolve(path))
    assert len(list_class_folders(tmp_path / "links")) == 100
    assert len(calls) < 300
