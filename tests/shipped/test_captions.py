import torch

from inpo_fast.shipped import captions, model_path, scenes


def load_tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(model_path() / "tokenizer", local_files_only=True)


def test_every_word_is_one_known_token():
    tokenizer = load_tokenizer()
    for word in captions.words():
        ids = tokenizer(word).input_ids
        assert len(ids) == 3
        assert tokenizer.unk_token_id not in ids[:-1]


def test_the_shipped_tokenizer_is_the_one_built_here():
    assert load_tokenizer().get_vocab() == captions.build_tokenizer().get_vocab()


def test_other_text_falls_apart_into_known_characters():
    tokenizer = load_tokenizer()
    ids = tokenizer("Zebra-crossing #42!").input_ids
    assert tokenizer.unk_token_id not in ids[:-1]


def test_batched_captions_equal_the_tokenizer():
    tokenizer = load_tokenizer()
    generator = torch.Generator().manual_seed(0)
    codes = scenes.sample_codes(500, generator)
    phrasing = torch.randint(4, (500,), generator=generator)
    prompts = [
        scenes.prompt(scene, int(p))
        for scene, p in zip(scenes.decode(codes), phrasing, strict=True)
    ]
    expected = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    assert expected.shape == (500, captions.MAX_TOKENS)
    encoder = captions.CaptionEncoder("cpu")
    assert torch.equal(encoder(codes, phrasing), expected)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(encoder.empty(1, "cpu"), empty)


def test_corruption_replaces_the_stated_share_of_words():
    generator = torch.Generator().manual_seed(0)
    codes = scenes.sample_codes(20000, generator)
    corrupt = captions.Corruption("cpu")
    assert torch.equal(corrupt(codes, 0.0, generator), codes)
    result = corrupt(codes, 0.6, generator)
    pair = codes[:, 5] >= 0
    # A random word is the old one in one case of n: six colours, four shapes, two sizes.
    for column, count in ((2, 6), (1, 4), (3, 2)):
        share = (result[:, column] != codes[:, column]).float().mean().item()
        assert abs(share - 0.6 * (1 - 1 / count)) < 0.02
    assert (result[~pair, 5:] == -1).all()
    assert set(result[pair, 4].tolist()) <= set(codes[pair, 4].tolist())
