"""``lowbit errors``: its table, its JSON, its plot, and files that cannot be read."""

import numpy as np
import soundfile


def test_kinds_and_blocks(float_model, clips, lowbit):
    found = lowbit("errors", float_model, *clips, "--json")
    assert found.code == 0
    kinds = found.json["kinds"]
    assert list(kinds) == ["attention", "feed_forward", "front_end", "all"]
    assert found.json["utterances"] == len(clips)
    for error in kinds.values():
        assert len(error["noise_to_signal_db"]) == len(found.json["blocks"])
        assert 0 <= error["disagreement"] <= 1
    assert kinds["all"]["layers"] == sum(
        error["layers"] for kind, error in kinds.items() if kind != "all"
    )
    shown = lowbit("errors", float_model, *clips)
    assert shown.code == 0
    assert f"{kinds['all']['end_db']:.1f}" in shown.out
    assert "other tokens" in shown.out


def test_more_bits_less_error(float_model, clips, lowbit):
    ends = [
        lowbit("errors", float_model, clips[0], "--bits", bits, "--preset", "small", "--json").json[
            "kinds"
        ]["all"]["end_db"]
        for bits in (8, 4, 2)
    ]
    assert ends[0] < ends[1] - 10 < ends[2] - 15


def test_an_encoder_has_no_tokens(make_model, clips, lowbit, tmp_path):
    folder = make_model(tmp_path / "float", "HubertModel")
    found = lowbit("errors", folder, clips[0], "--json").json
    assert found["kinds"]["all"]["disagreement"] is None


def test_plot(float_model, clips, lowbit, tmp_path):
    target = tmp_path / "errors.svg"
    assert lowbit("errors", float_model, clips[0], "--plot", target).code == 0
    text = target.read_text()
    assert "feed-forward" in text or "<svg" in text
    refused = lowbit("errors", float_model, clips[0], "--plot", tmp_path / "errors.gif")
    assert refused.code == 2
    assert "--plot must end in .png, .svg, .pdf, got" in refused.err


def test_a_bad_file_does_not_stop_the_others(float_model, clips, lowbit, tmp_path):
    short = tmp_path / "short.wav"
    soundfile.write(short, np.zeros(20, np.float32), 16_000)
    found = lowbit("errors", float_model, clips[0], short, "--json")
    assert found.code == 2
    assert "short.wav: too short: 20 samples at 16000 Hz" in found.err
    assert found.json["utterances"] == 1
    alone = lowbit("errors", float_model, short)
    assert alone.code == 2
    assert "short.wav: too short" in alone.err
    assert "Traceback" not in alone.err


def test_a_low_bit_model_is_refused(small_model, clips, lowbit):
    refused = lowbit("errors", small_model, clips[0])
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    assert "float" in refused.err
