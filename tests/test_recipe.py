"""The recipe: defaults of the card, settings checked all at once."""

from pathlib import Path

import pytest

from brie_mlx.errors import RecipeError
from brie_mlx.recipe import Recipe


def test_the_defaults_are_those_of_the_card() -> None:
    recipe = Recipe()
    assert (recipe.r, recipe.lora_alpha, recipe.lora_dropout, len(recipe.target_modules)) == (8, 16, 0.05, 7)
    assert (recipe.num_train_epochs, recipe.window, recipe.learning_rate, recipe.warmup_steps) == (2, 8, 2e-4, 20)
    assert (recipe.logging_steps, recipe.eval_steps, recipe.save_steps, recipe.seed) == (10, 50, 100, 42)


def test_json_and_back_is_the_same_recipe() -> None:
    recipe = Recipe(learning_rate=1e-3, target_modules=("q_proj",), valid=None, save_total_limit=2)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_toml_comes_in(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('learning_rate = 1\ntarget_modules = ["q_proj", "v_proj"]\nuse_rslora = true\n')
    recipe = Recipe.read(path)
    assert (recipe.learning_rate, recipe.target_modules, recipe.use_rslora) == (1, ("q_proj", "v_proj"), True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5e-3", 5e-3), (".5", 0.5), ("1", 1)],
)
def test_numbers_on_the_command_line_may_be_written_any_way(text: str, expected: float) -> None:
    assert Recipe().override({"learning_rate": text}).learning_rate == expected


def test_lists_words_and_none_on_the_command_line() -> None:
    recipe = Recipe().override({"target_modules": "q_proj, v_proj", "valid": "none", "shuffle": "False", "data": "123"})
    assert (recipe.target_modules, recipe.valid, recipe.shuffle, recipe.data) == (
        ("q_proj", "v_proj"),
        None,
        False,
        "123",
    )


def test_an_unknown_setting_is_named_with_the_near_miss_and_all_problems_come_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"lerning_rate": 1, "r": "eight", "dtype": "int8", "shuffle": 1}, source="recipe.toml")
    text = str(caught.value)
    assert "recipe.toml has settings" in text
    assert "lerning_rate: unknown; did you mean learning_rate?" in text
    assert "r = 'eight': expected a whole number" in text
    assert "dtype = 'int8': expected one of auto, float32, bfloat16, float16" in text
    assert "shuffle = 1: expected true or false" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", "0"),
        ("lora_alpha", "0"),
        ("lora_dropout", "1"),
        ("learning_rate", "-1"),
        ("learning_rate", "nan"),
        ("num_train_epochs", "0"),
        ("max_steps", "0"),
        ("max_length", "1"),
        ("seed", "-1"),
        ("save_total_limit", "0"),
        ("max_grad_norm", "inf"),
        ("target_modules", "lm_head"),
        ("target_modules", ""),
        ("micro_batch_tokens", "0"),
        ("adam_beta2", "1"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(name: str, value: str) -> None:
    with pytest.raises(RecipeError, match=rf"{name} = .*: expected"):
        Recipe().override({name: value})


def test_a_file_that_is_no_toml_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("= 1")
    with pytest.raises(RecipeError, match=r"bad.toml is not a TOML file"):
        Recipe.read(tmp_path / "bad.toml")
    with pytest.raises(RecipeError, match=r"none.toml does not exist"):
        Recipe.read(tmp_path / "none.toml")
