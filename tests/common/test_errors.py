"""The two errors: messages, and pickling to and from a worker process."""

from __future__ import annotations

import pickle

from mellum2_megatron.common.errors import InputError, WorkError, nearest


def test_messages_name_value_rule_and_fix():
    assert (
        str(InputError("layout.ep=3", rule="must divide 8", fix="use 2"))
        == "layout.ep=3: must divide 8. Fix: use 2."
    )
    assert str(WorkError("disk full", fix="free space")) == "disk full. Fix: free space."


def test_errors_survive_pickling():
    for error in (InputError("a=1", rule="b", fix="c"), WorkError("a", fix="b")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_nearest_name_or_the_whole_list():
    assert nearest("layot.ep", ["layout.ep", "layout.tp"]) == "did you mean 'layout.ep'"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
