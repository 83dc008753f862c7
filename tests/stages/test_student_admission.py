"""A student that training would refuse is refused before its answers are sampled."""

from helpers_stages import rollout_argv, write_prompts

from benchmarks.families import byte_tokenizer
from benchmarks.tiny_families import tiny_model
from lopd.cli import main


def test_a_router_whose_loss_cannot_be_trained_is_refused_at_the_rollout(tmp_path, capsys):
    student = tmp_path / "student"
    tiny_model("granitemoe").save_pretrained(student)
    byte_tokenizer().save_pretrained(student)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    assert main(rollout_argv(student, prompts, tmp_path / "out")) == 2
    assert "returned no router logits" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("shard-*.safetensors"))
