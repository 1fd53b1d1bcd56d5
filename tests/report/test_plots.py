"""Pictures from result files."""

from PIL import Image

from llama_engine.report import plots
from llama_engine.report.story import Story, waterfall_steps


def test_pictures_carry_their_source(folder):
    story = Story.load(folder)
    paths = plots.draw_all(story, folder)
    assert [path.name for path in paths] == [name for name in plots.PICTURES if name != "ladder.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.info["Source-SHA256"] == story.sha256
            assert min(picture.size) > 700


def test_waterfall_needs_the_same_workload(folder, edit_json):
    assert len(waterfall_steps(Story.load(folder))) == 3
    edit_json(folder / "triton-native.json", {"workload": {"input_tokens": 4, "output_tokens": 9}})
    assert len(waterfall_steps(Story.load(folder))) == 2
