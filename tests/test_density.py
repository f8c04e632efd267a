"""The script does not grow dense: what density.py measures stays within limits."""

import density

LIMITS = {  # of this project; a fork may raise them
    "lines": 2_999,  # the design asks for 2,300
    "lines over 100 columns": 0,
    "mean names in a line of code": 4.3,
    "lines of the longest function": 45,
    "line where contrastive_loss begins": 149,
    "line where the heart (sections 1 to 3) ends": 450,
}


def test_the_script_stays_within_the_limits():
    measured = density.measure(density.SCRIPT.read_text("utf-8"))
    over = {}
    for what, value in measured.items():
        limit = LIMITS[what.partition(",")[0]]
        if value > limit:
            over[what] = f"{value}, at most {limit}"
    assert len(measured) == len(LIMITS)
    assert not over, "shorten the script, or raise LIMITS in a fork"


def test_the_measures_of_a_small_text():
    text = '"""Two\nlines."""\nimport os  # names in comments do not count\n\n'
    text += "def contrastive_loss(a, b):\n    return a or b\n"
    text += "\n\n# ---- 4. What follows\nx = " + " + ".join(["1"] * 40) + "\n"
    lines, long_lines, names, longest, loss, heart = density.measure(text).values()
    assert (lines, long_lines, longest, loss, heart) == (10, 1, 2, 5, 6)
    assert names == (1 + 3 + 2 + 1) / 4
