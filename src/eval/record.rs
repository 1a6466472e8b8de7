//! Records of the datasets that tasks are made of: which dataset one is of, and the harness's prompt for it.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::task::{Choice, Item};

/// Why a record is no item.
type Reason = String;

/// A dataset, and by what its records are told from those of others.
struct Dataset {
    /// The variant of [`Record`], and what people call it.
    name: &'static str,
    /// Fields that all its records have.
    fields: &'static [&'static str],
    /// All fields beside those, where `fields` alone are those of other datasets too, with other prompts.
    others: Option<&'static [&'static str]>,
}

const DATASETS: [Dataset; 11] = [
    Dataset::of("prepared choices", &["query", "choices", "gold"]),
    Dataset::of("prepared contexts", &["context_options", "continuation", "gold"]),
    Dataset::of("PIQA", &["goal", "sol1", "sol2"]),
    Dataset::of("HellaSwag", &["activity_label", "ctx_a", "ctx_b", "endings"]),
    Dataset::of("WinoGrande", &["sentence", "option1", "option2"]),
    Dataset::of("OpenBookQA", &["question_stem", "choices"]),
    // CommonsenseQA and QASC have these as well.
    Dataset { others: Some(&["id", "idx"]), ..Dataset::of("ARC", &["question", "choices", "answerKey"]) },
    Dataset::of("BoolQ", &["passage", "question"]),
    Dataset::of(
        "SciQ",
        &["support", "question", "correct_answer", "distractor1", "distractor2", "distractor3"],
    ),
    Dataset::of("COPA", &["premise", "choice1", "choice2", "question"]),
    // A text that has a label, say, is not there for its last word.
    Dataset { others: Some(&["domain", "id", "idx"]), ..Dataset::of("LAMBADA", &["text"]) },
];

impl Dataset {
    const fn of(name: &'static str, fields: &'static [&'static str]) -> Self {
        Self { name, fields, others: None }
    }

    fn has(&self, record: &Map<String, Value>) -> bool {
        let known = |name: &str, others: &[&str]| self.fields.contains(&name) || others.contains(&name);
        self.fields.iter().all(|field| record.contains_key(*field))
            && self.others.is_none_or(|others| record.keys().all(|name| known(name, others)))
    }
}

/// A record by its dataset's name in [`DATASETS`].
#[derive(Deserialize)]
enum Record {
    #[serde(rename = "prepared choices")]
    Prepared {
        query: String,
        choices: Vec<String>,
        gold: Label,
    },
    #[serde(rename = "prepared contexts")]
    Contexts {
        context_options: Vec<String>,
        continuation: String,
        gold: Label,
    },
    #[serde(rename = "PIQA")]
    Piqa {
        goal: String,
        sol1: String,
        sol2: String,
        label: Label,
    },
    HellaSwag {
        activity_label: String,
        ctx_a: String,
        ctx_b: String,
        endings: Vec<String>,
        label: Label,
    },
    WinoGrande {
        sentence: String,
        option1: String,
        option2: String,
        answer: Label,
    },
    #[serde(rename = "OpenBookQA")]
    OpenBook {
        question_stem: String,
        choices: Lettered,
        #[serde(rename = "answerKey")]
        answer: String,
    },
    #[serde(rename = "ARC")]
    Arc {
        question: String,
        choices: Lettered,
        #[serde(rename = "answerKey")]
        answer: String,
    },
    BoolQ {
        passage: String,
        question: String,
        #[serde(alias = "answer")]
        label: Label,
    },
    SciQ {
        support: String,
        question: String,
        correct_answer: String,
        distractor1: String,
        distractor2: String,
        distractor3: String,
    },
    #[serde(rename = "COPA")]
    Copa {
        premise: String,
        choice1: String,
        choice2: String,
        question: Relation,
        label: Label,
    },
    #[serde(rename = "LAMBADA")]
    Lambada {
        text: String,
    },
}

/// The place of the right choice, as the datasets write it: a number, a truth, or a number as text.
#[derive(Deserialize)]
struct Label(Value);

#[derive(Deserialize)]
struct Lettered {
    label: Vec<String>,
    text: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Relation {
    Cause,
    Effect,
}

impl Label {
    fn place(&self, field: &str) -> Result<usize, Reason> {
        let place = match &self.0 {
            Value::Number(place) => place.as_u64().and_then(|place| usize::try_from(place).ok()),
            Value::Bool(truth) => Some(usize::from(*truth)),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        };
        place.ok_or_else(|| no_answer(field, &self.0, "the place of a choice"))
    }
}

impl Lettered {
    fn place(&self, answer: &str) -> Result<usize, Reason> {
        let found = self.label.iter().position(|label| label == answer.trim_start());
        found.ok_or_else(|| no_answer("answerKey", &Value::from(answer), &format!("one of {:?}", self.label)))
    }
}

/// Test splits are published without answers: with -1 or an empty text in their place.
fn no_answer(field: &str, found: &Value, expected: &str) -> Reason {
    format!("{field} is {found}, which is no answer, expected {expected}")
}

/// The item that a line holds.
pub(super) fn item(line: &str) -> Result<Item, Reason> {
    let record: Map<String, Value> =
        serde_json::from_str(line).map_err(|error| format!("no JSON object: {error}"))?;
    let Some(dataset) = DATASETS.iter().find(|dataset| dataset.has(&record)) else {
        let fields: Vec<&str> = record.keys().map(String::as_str).collect();
        return Err(format!("fields [{}] are of no known task", fields.join(", ")));
    };
    let named = Map::from_iter([(dataset.name.to_string(), Value::Object(record))]);
    let record: Record = serde_json::from_value(Value::Object(named))
        .map_err(|error| format!("a record of {}: {error}", dataset.name))?;
    let item = record.item()?;
    if item.gold >= item.choices.len() {
        return Err(format!("gold is {}, of {} choices", item.gold, item.choices.len()));
    }
    match item.choices.iter().position(|choice| choice.continuation.trim().is_empty()) {
        Some(place) => Err(format!("choice {place} is empty")),
        None => Ok(item),
    }
}

impl Record {
    fn item(self) -> Result<Item, Reason> {
        Ok(match self {
            Self::Prepared { query, choices, gold } => {
                let asks = query.starts_with("Question:") && !query.trim_end().ends_with("Answer:");
                let line = query.strip_suffix('\n').unwrap_or(&query);
                let context = if asks { format!("{line}\nAnswer:") } else { query };
                continuations(&context, &choices, gold.place("gold")?)
            }
            Self::Contexts { context_options, continuation, gold } => {
                contexts(&context_options, &continuation, gold.place("gold")?)
            }
            Self::Piqa { goal, sol1, sol2, label } => {
                continuations(&asked(&goal), &[sol1, sol2], label.place("label")?)
            }
            Self::HellaSwag { activity_label, ctx_a, ctx_b, endings, label } => {
                let context = cleaned(&format!("{activity_label}: {ctx_a} {}", capitalized(&ctx_b)));
                let endings: Vec<String> = endings.iter().map(|ending| cleaned(ending)).collect();
                continuations(&context, &endings, label.place("label")?)
            }
            Self::WinoGrande { sentence, option1, option2, answer } => {
                let (before, after) = sentence.split_once('_').ok_or("a sentence without a blank, \"_\"")?;
                let options = [format!("{before}{option1}"), format!("{before}{option2}")];
                let place = answer.place("answer")?.checked_sub(1).ok_or("answer is 0, expected 1 or 2")?;
                contexts(&options, after.trim(), place)
            }
            Self::OpenBook { question_stem, choices, answer } => {
                continuations(&question_stem, &choices.text, choices.place(&answer)?)
            }
            Self::Arc { question, choices, answer } => {
                continuations(&asked(&question), &choices.text, choices.place(&answer)?)
            }
            Self::BoolQ { passage, question, label } => {
                let context = format!("{passage}\nQuestion: {question}?\nAnswer:");
                let item = continuations(&context, &["no".into(), "yes".into()], label.place("label")?);
                Item { by_length: false, ..item }
            }
            Self::SciQ { support, question, correct_answer, distractor1, distractor2, distractor3 } => {
                let context = format!("{}\n{}", support.trim_start(), asked(&question));
                continuations(&context, &[distractor1, distractor2, distractor3, correct_answer], 3)
            }
            Self::Copa { premise, choice1, choice2, question, label } => {
                let premise = premise.trim();
                let stem = premise.char_indices().last().map_or("", |(end, _)| &premise[..end]);
                let word = match question {
                    Relation::Cause => "because",
                    Relation::Effect => "therefore",
                };
                // The harness's choices begin with a space, and it puts one before every choice.
                let choices = [choice1, choice2].map(|choice| format!(" {}", uncapitalized(&choice)));
                let item = continuations(&format!("{stem} {word}"), &choices, label.place("label")?);
                Item { by_length: false, ..item }
            }
            Self::Lambada { text } => {
                let (context, word) = text.rsplit_once(' ').ok_or("a text of one word")?;
                continuations(context, &[word.into()], 0)
            }
        })
    }
}

/// One text and several continuations.
fn continuations(context: &str, choices: &[String], gold: usize) -> Item {
    let choice = |text: &String| Choice {
        context: context.into(),
        continuation: format!(" {text}"),
        length: text.chars().count(),
    };
    Item { choices: choices.iter().map(choice).collect(), gold, by_length: choices.len() > 1 }
}

/// Several texts and one continuation, whose length says nothing.
fn contexts(contexts: &[String], continuation: &str, gold: usize) -> Item {
    let choice = |context: &String| Choice {
        context: context.clone(),
        continuation: format!(" {continuation}"),
        length: continuation.chars().count(),
    };
    Item { choices: contexts.iter().map(choice).collect(), gold, by_length: false }
}

fn asked(question: &str) -> String {
    format!("Question: {question}\nAnswer:")
}

/// Without the marks that `WikiHow` left in `HellaSwag`: brackets that close on the line they open on.
fn cleaned(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once('[') {
        kept.push_str(before);
        rest = match after.split_once(']') {
            Some((inside, beyond)) if !inside.contains('\n') => beyond,
            _ => {
                kept.push('[');
                after
            }
        };
    }
    kept.push_str(rest);
    kept.replace("  ", " ")
}

/// First letter large, all others small.
fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().collect::<String>() + &letters.as_str().to_lowercase()
    })
}

fn uncapitalized(text: &str) -> String {
    let mut letters = text.chars();
    letters
        .next()
        .map_or_else(String::new, |first| first.to_lowercase().collect::<String>() + letters.as_str())
}
