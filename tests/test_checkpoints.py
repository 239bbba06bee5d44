"""A state comes back bit for bit, or not at all: not if it was damaged, and not for another plan."""

import numpy as np
import pytest

from tokcx_lib import checkpoints

PLAN = b'{"seed": 3}'
ARRAYS = {
    "numbers": np.array([[0.1, -0.0, np.nan], [np.inf, 1e-320, 1 / 3]]),
    "single": np.float32([1 / 3]),
    "none": np.zeros((0, 4)),
    "count": np.array(7),
}


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "state.npz"
    checkpoints.write(path, checkpoints.pack(ARRAYS), PLAN, note="1.250 s")
    return path


def test_a_state_comes_back_bit_for_bit(state):
    content, note = checkpoints.read(state, PLAN)
    found = checkpoints.unpack(content)
    assert note == "1.250 s" and found.keys() == ARRAYS.keys() and list(state.parent.iterdir()) == [state]
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_a_state_of_another_plan_is_refused(state):
    for plan in (b"", b'{"seed": 4}', PLAN + b" "):
        with pytest.raises(ValueError, match="state.npz was damaged or edited"):
            checkpoints.read(state, plan)


def test_whatever_is_changed_cut_off_or_added_is_found(state):
    whole = state.read_bytes()
    sealed = len(whole) - len(" 1.250 s\n")  # the note is not in the checksum
    changed = (whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(sealed))
    shorter = (whole[:i] for i in range(0, len(whole), 7))
    for damaged in (*changed, *shorter, whole + b"\n", whole + b"# ", b"#" + whole, b"# 17 s\n"):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            checkpoints.read(state, PLAN)


def test_a_state_may_hold_what_looks_like_its_last_line(tmp_path):
    path = tmp_path / "1.csv"
    checkpoints.write(path, b"# ", b"", "1 s")
    checkpoints.write(path, path.read_bytes(), b"", "1 s")
    assert checkpoints.read(path, b"")[0].startswith(b"# # ")


def test_nothing_in_a_state_is_executed():
    with pytest.raises(ValueError, match="allow_pickle"):
        checkpoints.unpack(checkpoints.pack({"objects": np.array([None, print])}))
