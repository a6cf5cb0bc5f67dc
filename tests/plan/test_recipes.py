"""Recipes of an earlier version: finished work of it counts as long as nothing that computes has changed.

`recipes.json` has two configs and the recipes of their stages as commit 9ca9300 made them. A recipe that changes makes
every user's stage run again, so a change here needs a new `version` of the stage and a line in CHANGELOG.md. Rows that
a stage leaves count by its fingerprint, which has the versions of libraries in it; here it is `…`.
"""

import json
import re
from pathlib import Path

import pytest

KNOWN = json.loads((Path(__file__).parent / "recipes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", KNOWN)
def test_recipes_are_those_of_the_version_before(project, name):
    steps = project.plan(KNOWN[name]["text"])
    recipes = {stage: json.loads(json.dumps(step.recipe)) for stage, step in steps.items()}
    text = re.sub("step:[0-9a-f]{64}", "step:…", json.dumps(recipes, ensure_ascii=False))
    assert json.loads(text) == KNOWN[name]["recipes"]
