import pytest

from glora.protocols import read_list


def listed(tmp_path, text):
    file = tmp_path / "train.txt"
    file.write_text(text)
    return file


def test_paths_may_hold_spaces_and_blank_lines_are_passed_over(tmp_path):
    file = listed(tmp_path, "images/a.jpg 3\n\nimagenet-a/n1/0.003_soap dispenser _ x.jpg 0\r\n")
    assert read_list(file, range(4)) == (("images/a.jpg", 3), ("imagenet-a/n1/0.003_soap dispenser _ x.jpg", 0))


def test_order_is_the_files(tmp_path):
    assert [label for _, label in read_list(listed(tmp_path, "z 2\na 0\nm 1\n"))] == [2, 0, 1]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a.jpg 0\nb.jpg\n", 2, "'<relative path> <class>', got 'b.jpg'"),
        ("a.jpg x\n", 1, "'<relative path> <class>'"),
        ("a.jpg -1\n", 1, "'<relative path> <class>'"),
        ("a.jpg 1.0\n", 1, "'<relative path> <class>'"),
        ("a.jpg ²\n", 1, "'<relative path> <class>'"),
        ("3\n", 1, "'<relative path> <class>'"),
        ("a.jpg 9\nb.jpg 10\n", 2, "a class from 0 to 9, got 10"),
        ("/etc/a.jpg 0\n", 1, "within the data set's folder"),
        ("../a.jpg 0\n", 1, "within the data set's folder"),
        ("a.jpg 0\nb.jpg 1\na.jpg 0\n", 3, "every image once, got 'a.jpg' again, after line 1"),
        ("a.jpg 0\nb.jpg 1\na.jpg 1\n", 3, "class 0 as in line 1"),
    ],
)
def test_malformed_lines_are_refused_with_file_and_line(tmp_path, text, line, message):
    file = listed(tmp_path, text)
    with pytest.raises(ValueError) as error:
        read_list(file, range(10))
    assert f"{file}, line {line}: expected" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_list_is_refused(tmp_path, text):
    file = listed(tmp_path, text)
    with pytest.raises(ValueError, match=r"train\.txt: expected lines"):
        read_list(file)


def test_binary_content_is_refused_by_name(tmp_path):
    file = tmp_path / "train.txt"
    file.write_bytes(b"\xff\xfe 0\n")
    with pytest.raises(ValueError, match=r"train\.txt: expected UTF-8"):
        read_list(file)


def test_repeats_are_kept_where_allowed_but_never_with_another_class(tmp_path):
    assert read_list(listed(tmp_path, "a 0\na 0\n"), repeats=True) == (("a", 0), ("a", 0))
    with pytest.raises(ValueError, match="line 2: expected class 0"):
        read_list(listed(tmp_path, "a 0\na 1\n"), repeats=True)


def test_classes_that_are_no_range_are_described(tmp_path):
    with pytest.raises(ValueError, match="a class of the 2 between 6 and 11, got 7"):
        read_list(listed(tmp_path, "a 7\n"), frozenset((6, 11)))
