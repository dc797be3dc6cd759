"""`ask` on a tiny model: each answer is that of its prompt, read alone."""

from __future__ import annotations

import pytest
import torch

from hf_longtrunc import Passage, TextIndex, ask, load_pretrained
from hf_longtrunc.asking.answers import find_passages
from hf_longtrunc.asking.prompt import PROMPT, chat_ids, fill_prompt, is_about_the_whole, without_passages
from tests.asking.test_index import SENTENCES, TEXT, ByWord

TEMPLATE = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}>"


@pytest.fixture(scope="module")
def model_and_tokenizer(model_folder):
    return load_pretrained(model_folder, device="cpu")


def alone(model, tokenizer, prompt, new=6, without=None, guidance=1.5):
    """The greedy answer to a prompt, guided away from the prompt without its passage; one token at a time."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    bare = None if without is None else tokenizer(without, return_tensors="pt").input_ids
    made = torch.empty(1, 0, dtype=torch.long)
    for _ in range(new):
        scores = model(torch.cat([ids, made], dim=1)).logits[0, -1].double().log_softmax(-1)
        if bare is not None:
            other = model(torch.cat([bare, made], dim=1)).logits[0, -1].double().log_softmax(-1)
            scores = guidance * scores - (guidance - 1) * other
        made = torch.cat([made, scores.argmax().view(1, 1)], dim=1)
        if made[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(made[0], skip_special_tokens=True).strip(), ids.shape[1]


USING = "Using only the passage above, answer in a few words: "


def test_an_answer_reads_its_passage_right_before_its_question(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    index = TextIndex(TEXT, ByWord())
    four, elephants = ask(model, tokenizer, index, ["Where is four ", "elephants"], context=0, max_new_tokens=6)
    without = f"{USING}Where is four\nAnswer:"
    prompt = f"{SENTENCES[3]}\n\n{without}"
    assert (four.text, four.tokens_read) == alone(model, tokenizer, prompt, without=without)
    for guidance in (0.5, 3.0, 1):
        (guided,) = ask(model, tokenizer, index, "Where is four", context=0, guidance=guidance, max_new_tokens=6)
        assert guided.text == alone(model, tokenizer, prompt, without=without, guidance=guidance)[0]
    assert (four.found, [each.text for each in four.passages]) == (True, [SENTENCES[3]])
    assert four.seconds > 0
    assert four.peak_bytes > 2**20
    assert (elephants.text, elephants.tokens_read) == alone(model, tokenizer, "elephants\nAnswer:")
    assert (elephants.found, elephants.passages) == (False, ())
    assert (
        ask(model, tokenizer, TEXT, "Where is four ", finder=ByWord(), context=0, max_new_tokens=6)[0].text == four.text
    )


def test_what_follows_the_question_mark_is_read_and_not_searched_for(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    (answer,) = ask(model, tokenizer, TEXT, "four ? six six six", finder=ByWord(), context=0, max_new_tokens=6)
    assert [each.text for each in answer.passages] == [SENTENCES[3]]
    without = f"{USING}four ? six six six\nAnswer:"
    assert (answer.text, answer.tokens_read) == alone(model, tokenizer, f"{SENTENCES[3]}\n\n{without}", without=without)


def test_a_model_in_training_mode_answers_in_eval_mode(model_folder):
    """As `get_peft_model` and a trainer's callback leave it."""
    model, tokenizer = load_pretrained(model_folder, device="cpu")
    expected = ask(model, tokenizer, TEXT, "Where is four ", finder=ByWord(), max_new_tokens=6)[0].text
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    assert ask(model, tokenizer, TEXT, "Where is four ", finder=ByWord(), max_new_tokens=6)[0].text == expected
    assert model.training


def test_several_passages_stand_with_the_best_last_and_their_source(model_and_tokenizer):
    passages = [Passage(0, 3, "Best\none.", 2.0, "a"), Passage(5, 9, "Other.", 1.0, "b")]
    assert (
        fill_prompt("{question} | {passages}", passages, " {passages}? ") == "{passages}? | b: Other.\n\na: Best one."
    )
    assert fill_prompt(PROMPT, [], " Why? ") == "Why?"
    around = Passage(0, 13, "One. Two.\nAll.", 2.0, "a", "Two.")
    assert fill_prompt("{passages}|{question}", [around], "?") == "a: One. Two. All.|?"
    assert without_passages("{question} | {passages}", " {passages}? ") == "{passages}? |"
    model, tokenizer = model_and_tokenizer
    documents = {"a": TEXT, "b": "An elephant is mentioned here and only here, of all places."}
    (answer,) = ask(model, tokenizer, documents, "elephant six six", finder=ByWord(), count=2, max_new_tokens=2)
    assert [each.source for each in answer.passages] == ["a", "b"]


def test_a_second_hop_looks_with_the_words_of_the_first_passage(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    text = "Ezra lodged with a certain Mrs Quill for two years. Nothing is said in this sentence, as always. "
    text += "Quill had a shop in Lime Row."
    index = TextIndex(text, ByWord())
    (one,) = ask(model, tokenizer, index, "Ezra", context=0, max_new_tokens=2)
    (two,) = ask(model, tokenizer, index, "Ezra", hops=2, context=0, max_new_tokens=2)
    assert [each.text[:5] for each in one.passages] == ["Ezra "]
    assert [each.text[:5] for each in two.passages] == ["Ezra ", "Quill"]
    text = "Ezra lodged with a certain Quill for two years. A zebra and a zither stood in the hall all the time. "
    text += "It rained a lot, and nobody minded. Quill had a shop in Lime Row, next to the old fish market. "
    text += "Another zebra and another zither came by later, and both of them stood in the hall."
    _, hop = ask(model, tokenizer, TextIndex(text, ByWord()), "Ezra", hops=2, max_new_tokens=2)[0].passages
    assert hop.match.startswith("It rained")  # with Quill, and not the words around Ezra's sentence


def test_a_follow_up_is_read_with_the_turn_before_it_and_others_are_not(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    text = "Ann was born in the town of Leeds in the month of May. Bob never left the village of York, it is said."
    index = TextIndex(text, ByWord())
    first, second, third = ask(model, tokenizer, index, ["Ann", "born", "Bob York"], follow_up=True, max_new_tokens=6)
    said = fill_prompt(PROMPT, second.passages, "born")
    turn = f"Ann\nAnswer: {first.text}\n\n"
    assert (second.text, second.tokens_read) == alone(
        model, tokenizer, f"{turn}{said}\nAnswer:", without=f"{turn}{USING}born\nAnswer:"
    )
    assert third.text == ask(model, tokenizer, index, "Bob York", max_new_tokens=6)[0].text
    passages, turns = find_passages(index, "born never left", [("Ann", "")], context=0)  # 2 for Bob, 1.25 for Ann
    assert (passages[0].text[:3], turns) == ("Bob", [])
    (again,) = ask(model, tokenizer, index, "born", before=[("Ann", first.text)], max_new_tokens=6)
    assert again.text == second.text


def test_the_chat_template_frames_turns(model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    plain = chat_ids(tokenizer, [], "hi")
    assert plain == tokenizer("hi\nAnswer:").input_ids
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}, {% endfor %}"
    try:
        assert chat_ids(tokenizer, [("a", "b")], "c") == tokenizer("a, b, c, ").input_ids
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("question", "whole"),
    [
        *(("Summarise the book.", True), ("Who is the narrator?", True), ("What is this story about?", True)),
        *(("What was the letter about?", False), ("Who sold the book?", False)),
    ],
)
def test_a_question_about_the_whole_reads_places_all_over_it(model_and_tokenizer, question, whole):
    model, tokenizer = model_and_tokenizer
    assert is_about_the_whole(question) is whole
    (answer,) = ask(model, tokenizer, TEXT, question, finder=ByWord(), max_new_tokens=2)
    assert (len(answer.passages) > 0) is (whole or any(word in TEXT for word in question.split()))
    if whole:
        assert answer.passages[0].text == TEXT  # six units that touch


def test_what_cannot_be_asked_is_refused(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    with pytest.raises(ValueError, match=r"questions must be texts that ask something, got '  '"):
        ask(model, tokenizer, TEXT, ["one", "  "], finder=ByWord())
    with pytest.raises(ValueError, match=r"prompt must hold \{passages\} once, got it 0 times"):
        ask(model, tokenizer, TEXT, "one", finder=ByWord(), prompt="{question}")
    with pytest.raises(ValueError, match="hops must be a whole number from 1 to 2, got 3"):
        ask(model, tokenizer, TEXT, "one", finder=ByWord(), hops=3)
    unread = ByWord()
    unread.read = None  # an error comes before a text is read
    for name, least in (("count", 1), ("context", 0), ("max_new_tokens", 1)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least {least}, got -1"):
            ask(model, tokenizer, TEXT, "one", finder=unread, **{name: -1})
    with pytest.raises(ValueError, match="guidance must be a number of at least 0, got -1"):
        ask(model, tokenizer, TEXT, "one", finder=ByWord(), guidance=-1)
    with pytest.raises(ValueError, match="finder goes with a text"):
        ask(model, tokenizer, TextIndex(TEXT, ByWord()), "one", finder=ByWord())
