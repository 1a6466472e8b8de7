//! Tasks answered by likelihood, against whole forwards of the same texts and against lm-evaluation-harness.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use foldgpt::candle::{D, DType, Device, Tensor};
use foldgpt::eval::{Accuracy, Choice, Task, accuracy, answers};
use foldgpt::{Checkpoint, Decoder, Tokenizer};
use serde_json::Value;

fn model() -> (Decoder, Tokenizer) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny-stories");
    let checkpoint = Checkpoint::open(directory).unwrap();
    (checkpoint.decoder(DType::F32, &Device::Cpu).unwrap(), checkpoint.tokenizer().unwrap())
}

/// The log-likelihood of a continuation by one forward over the whole text, and whether it is the likeliest.
fn plain(decoder: &Decoder, tokenizer: &Tokenizer, choice: &Choice) -> (f64, bool) {
    let text = format!("{}{}", choice.context, choice.continuation);
    let begin = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    let encode =
        |text: &str| -> Vec<u32> { begin.into_iter().chain(tokenizer.encode(text).unwrap()).collect() };
    let (ids, first) = (encode(&text), encode(choice.context.trim_end()).len());
    let logits = decoder.forward(&Tensor::from_slice(&ids, (1, ids.len()), &Device::Cpu).unwrap()).unwrap();
    let logits = logits.squeeze(0).unwrap();
    let likely = candle_nn::ops::log_softmax(&logits, D::Minus1).unwrap().to_vec2::<f32>().unwrap();
    let best = logits.argmax(D::Minus1).unwrap().to_vec1::<u32>().unwrap();
    let places = first..ids.len();
    let total = places.clone().map(|place| f64::from(likely[place - 1][ids[place] as usize])).sum();
    (total, places.clone().all(|place| best[place - 1] == ids[place]))
}

#[test]
fn answers_are_those_of_whole_forwards() {
    let (decoder, tokenizer) = model();
    let lines = concat!(
        r#"{"query": "Anna lost her red", "choices": ["kite near the old bridge.", "and", "kite"], "gold": 2}"#,
        "\n",
        r#"{"query": "Anna lost her ", "choices": ["kite.", "lost her and the the"], "gold": 0}"#,
        "\n",
        r#"{"query": "Tom found a blue ball. ", "choices": ["Tom was happy.", "Tom found a was happy."], "gold": 1}"#,
        "\n",
        r#"{"goal": "Find the kite", "sol1": "look near the bridge", "sol2": "red red red", "label": 0}"#,
    );
    let task = Task::from_json_lines("stories", lines, None).unwrap();
    let (mut right, mut right_by_length) = (0, 0);
    for item in &task.items {
        let scores: Vec<f64> =
            item.choices.iter().map(|choice| plain(&decoder, &tokenizer, choice).0).collect();
        let by_length: Vec<f64> =
            scores.iter().zip(&item.choices).map(|(score, choice)| score / choice.length as f64).collect();
        let wins = |scores: &[f64]| scores.iter().all(|score| *score <= scores[item.gold]);
        right += usize::from(wins(&scores));
        right_by_length += usize::from(wins(&by_length));
    }
    let found = accuracy(&decoder, &tokenizer, &task, &mut ()).unwrap();
    let answered = answers(&decoder, &tokenizer, &task, &mut ()).unwrap();
    assert_eq!(Accuracy::of(&answered), found);
    for (answer, item) in answered.iter().zip(&task.items) {
        assert_eq!((answer.gold, answer.log_likelihoods.len()), (item.gold, item.choices.len()));
        for (found, choice) in answer.log_likelihoods.iter().zip(&item.choices) {
            let (expected, _) = plain(&decoder, &tokenizer, choice);
            assert!((found - expected).abs() < 1e-3, "{found} is not {expected}");
        }
    }
    assert_eq!(found.items, 4);
    assert!((found.acc - right as f64 / 4.0).abs() < 1e-12, "{found:?}, {right} right");
    assert!((found.acc_norm.unwrap() - right_by_length as f64 / 4.0).abs() < 1e-12);
}

#[test]
fn a_last_word_is_right_where_the_model_would_say_it() {
    let (decoder, tokenizer) = model();
    let texts = ["Anna lost her red kite", "Anna lost her red zebra", "Once there was a"];
    let lines: Vec<String> =
        texts.iter().map(|text| serde_json::json!({ "text": text }).to_string()).collect();
    let task = Task::from_json_lines("lambada", &lines.join("\n"), None).unwrap();
    let plain: Vec<(f64, bool)> =
        task.items.iter().map(|item| plain(&decoder, &tokenizer, &item.choices[0])).collect();
    let found = accuracy(&decoder, &tokenizer, &task, &mut ()).unwrap();
    let expected = plain.iter().filter(|(_, greedy)| *greedy).count() as f64 / 3.0;
    assert!((found.acc - expected).abs() < 1e-12);
    let mean = plain.iter().map(|(score, _)| -score).sum::<f64>() / 3.0;
    assert!((found.perplexity.unwrap() / mean.exp() - 1.0).abs() < 1e-4);
    assert!(found.acc_norm.is_none());
}

/// What lm-evaluation-harness finds on the same records and model; tests/fixtures/README.md says how.
#[test]
fn results_are_those_of_the_harness() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tasks");
    let expected = std::fs::read_to_string(fixtures.join("expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let (decoder, tokenizer) = model();
    let tasks = expected["tasks"].as_object().unwrap();
    // Nine of them, one in two parts.
    assert_eq!(tasks.len(), 10);
    for (name, expected) in tasks {
        let task = Task::read(fixtures.join(name).with_extension("jsonl"), None).unwrap();
        let answers = answers(&decoder, &tokenizer, &task, &mut ()).unwrap();
        let found = Accuracy::of(&answers);
        assert_eq!(Some(found.items as u64), expected["items"].as_u64(), "{name}");
        for (metric, found) in [
            ("acc", Some(found.acc)),
            ("stderr", found.stderr),
            ("acc_norm", found.acc_norm),
            ("acc_norm_stderr", found.acc_norm_stderr),
            ("perplexity", found.perplexity),
        ] {
            let expected = expected.get(metric).and_then(Value::as_f64);
            assert_eq!(found.is_some(), expected.is_some(), "{metric} of {name}");
            let (found, expected) = (found.unwrap_or(1.0), expected.unwrap_or(1.0));
            // A perplexity is relative to its logits.
            let near = if metric == "perplexity" { 1e-3 * expected } else { 1e-9 };
            assert!((found - expected).abs() < near, "{metric} of {name}: {found} is not {expected}");
        }
        for (index, answer) in answers.iter().enumerate() {
            for (place, found) in answer.log_likelihoods.iter().enumerate() {
                let expected = expected["log_likelihoods"][index][place].as_f64().unwrap();
                assert!(
                    (found - expected).abs() < 1e-3,
                    "choice {place} of item {index} of {name}: {found} is not {expected}"
                );
            }
        }
    }
}

#[test]
fn answers_do_not_depend_on_the_items_before_them() {
    let (decoder, tokenizer) = model();
    let mut lines = [
        r#"{"query": "Anna lost her red kite near the old", "choices": ["bridge.", "bridge and", "day"], "gold": 0}"#,
        r#"{"query": "Anna lost her red kite near the", "choices": ["old bridge. Tom", "old"], "gold": 0}"#,
        r#"{"query": "Anna lost her red", "choices": ["kite near the old bridge.", "kite"], "gold": 1}"#,
    ];
    let answers_of = |lines: [&str; 3]| {
        let task = Task::from_json_lines("stories", &lines.join("\n"), None).unwrap();
        answers(&decoder, &tokenizer, &task, &mut ()).unwrap()
    };
    let forth = answers_of(lines);
    lines.reverse();
    let mut back = answers_of(lines);
    back.reverse();
    assert_eq!(forth, back);
}

#[test]
fn a_query_is_run_once_for_all_choices() {
    let (decoder, tokenizer) = model();
    let query = "Anna lost her red kite near the old bridge. Tom found it, and Anna was";
    // More than are run together.
    let choices =
        ["happy.", "sad.", "a dog.", "very", "so", "big.", "red and blue.", "old.", "there.", "Tom."];
    let record = serde_json::json!({ "query": query, "choices": choices, "gold": 0 });
    let task = Task::from_json_lines("stories", &record.to_string(), None).unwrap();
    let answer = answers(&decoder, &tokenizer, &task, &mut ()).unwrap().remove(0);
    let begin = usize::from(tokenizer.adds_bos());
    let length = |text: &str| begin + tokenizer.encode(text).unwrap().len();
    let longest = choices.iter().map(|choice| length(&format!("{query} {choice}"))).max().unwrap();
    // The query, and for each choice no more than the longest of them adds to it.
    let most = length(query) + choices.len() * (longest - length(query));
    assert!(answer.tokens <= most, "{} tokens were run, of {most}", answer.tokens);
    for (found, choice) in answer.log_likelihoods.iter().zip(&task.items[0].choices) {
        let (expected, _) = plain(&decoder, &tokenizer, choice);
        assert!((found - expected).abs() < 1e-3, "{found} is not {expected}");
    }
}

#[test]
fn one_item_has_no_standard_error() {
    let (decoder, tokenizer) = model();
    let line = r#"{"query": "Anna lost her red", "choices": ["kite.", "and"], "gold": 0}"#;
    let task = Task::from_json_lines("stories", line, None).unwrap();
    let found = accuracy(&decoder, &tokenizer, &task, &mut ()).unwrap();
    assert_eq!((found.stderr, found.acc_norm_stderr), (None, None));
    let json = serde_json::to_value(&found).unwrap();
    assert!(json.get("stderr").is_none() && json.get("acc_norm").is_some(), "{json}");
}

#[test]
fn files_of_one_name_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|parent| directory.path().join(parent).join("piqa.jsonl"));
    for path in &paths {
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        std::fs::write(path, r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}"#).unwrap();
    }
    assert_eq!(Task::read_all(&paths[..1], None).unwrap().len(), 1);
    let error = Task::read_all(&paths, None).unwrap_err().to_string();
    for named in [paths[0].to_str().unwrap(), paths[1].to_str().unwrap(), "piqa"] {
        assert!(error.contains(named), "{error}");
    }
}
