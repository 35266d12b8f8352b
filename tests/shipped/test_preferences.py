import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from inpo_fast import shipped
from inpo_fast.shipped import train


@pytest.fixture(scope="module")
def table():
    return pq.read_table(shipped.preferences_path())


def test_columns_are_those_of_pick_a_pic(table):
    assert table.schema.names == ["jpg_0", "jpg_1", "label_0", "caption"]
    assert table.schema.field("jpg_0").type == pa.binary()
    assert table.schema.field("label_0").type == pa.float32()
    assert table.schema.field("caption").type == pa.string()
    assert all(column.null_count == 0 for column in table.columns)


def test_there_are_enough_pairs_in_a_small_file(table):
    assert table.num_rows >= 1500
    assert shipped.preferences_path().stat().st_size <= 4e6


def test_winners_stand_on_either_side(table):
    labels = torch.tensor(table["label_0"].to_pylist())
    assert set(labels.tolist()) == {0.0, 1.0}
    assert 0.45 < labels.mean() < 0.55


def test_captions_are_from_the_training_split(table):
    scenes = [shipped.parse(caption) for caption in table["caption"].to_pylist()]
    assert not shipped.is_held_out(scenes).any()


def test_winners_score_higher(table):
    rows = table.slice(0, 400).to_pydict()
    scenes = [shipped.parse(caption) for caption in rows["caption"]]

    def scores(column):
        images = torch.stack([train.decode_jpeg(data) for data in rows[column]])
        assert images.shape[1:] == (3, 64, 64)
        return shipped.score(images, scenes)

    margin = scores("jpg_0") - scores("jpg_1")
    won = margin * (2 * torch.tensor(rows["label_0"]) - 1)
    assert (won > 0).float().mean() >= 0.95
    assert won.mean() > 0.2


def test_jpeg_keeps_what_the_reader_needs():
    scenes = shipped.held_out_scenes(50)
    images = shipped.render(scenes)
    decoded = torch.stack([train.decode_jpeg(train.encode_jpeg(image)) for image in images])
    assert shipped.score(decoded, scenes).mean() >= 0.995


def test_pairs_are_made_of_the_model_s_own_images(tmp_path):
    config = train.Config(preference_prompts=4, images_per_prompt=2)
    pipe = shipped.load_pipeline()
    columns, scores = train.make_preferences(pipe, config, torch.device("cpu"))
    assert len(scores) == len(columns["caption"]) > 0
    assert (scores[:, 0] > scores[:, 1]).all()
    train.write_preferences(columns, tmp_path / "pairs.parquet")
    assert pq.read_table(tmp_path / "pairs.parquet").num_rows == len(scores)
