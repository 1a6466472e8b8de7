//! Tasks from JSON Lines: each record becomes texts to continue, and continuations to choose from.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// Items that a model answers by how likely it finds each continuation.
///
/// Records are those of lm-evaluation-harness's datasets, told apart by their fields and turned into text by its
/// prompts, without examples before them: PIQA, ARC, `HellaSwag`, `WinoGrande`, `BoolQ`, `OpenBookQA`, `SciQ`, COPA,
/// LAMBADA. Prepared records hold `query`, `choices` and `gold` (a query that begins with `Question:`, whether or not
/// its line has an end, is followed by `Answer:` on the next line), or `context_options`, `continuation` and `gold`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Task {
    /// What the task is called; a file's stem.
    pub name: String,
    /// Its items.
    pub items: Vec<Item>,
}

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Item {
    /// A text and what may follow it, for each choice; one alone asks whether the model would say just that.
    pub choices: Vec<Choice>,
    /// The place of the right choice.
    pub gold: usize,
}

/// A continuation of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Choice {
    /// What is given.
    pub context: String,
    /// What follows it, with the space before it.
    pub continuation: String,
    /// The length by which `acc_norm` divides: characters of the choice as the record has it.
    pub length: usize,
}

impl Task {
    /// Reads a file, `limit` items at most.
    ///
    /// # Errors
    /// A file that cannot be read, a line that is no record of a known task, or no line at all.
    pub fn read(path: impl AsRef<Path>, limit: Option<usize>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        Self::from_json_lines(name, &text, limit).map_err(|error| Error::format(path, error.to_string()))
    }

    /// Reads JSON Lines, `limit` items at most.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn from_json_lines(name: impl Into<String>, text: &str, limit: Option<usize>) -> Result<Self> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let items = lines
            .take(limit.unwrap_or(usize::MAX))
            .map(|(index, line)| {
                Item::of(line).map_err(|reason| Error::Text(format!("line {}: {reason}", index + 1)))
            })
            .collect::<Result<Vec<_>>>()?;
        if items.is_empty() {
            return Err(Error::Text("no items, expected JSON Lines".into()));
        }
        Ok(Self { name: name.into(), items })
    }
}

/// The records that are known, by their fields.
#[derive(Deserialize)]
#[serde(untagged)]
enum Record {
    Prepared {
        query: String,
        choices: Vec<String>,
        gold: Label,
    },
    Options {
        context_options: Vec<String>,
        continuation: String,
        gold: Label,
    },
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
    OpenBook {
        question_stem: String,
        choices: Lettered,
        #[serde(rename = "answerKey")]
        answer: String,
    },
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
    Copa {
        premise: String,
        choice1: String,
        choice2: String,
        question: Relation,
        label: Label,
    },
    Lambada {
        text: String,
    },
}

/// The place of the right choice, as the datasets write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Label {
    Place(usize),
    Truth(bool),
    Text(String),
}

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
    fn place(&self) -> std::result::Result<usize, String> {
        match self {
            Self::Place(place) => Ok(*place),
            Self::Truth(truth) => Ok(usize::from(*truth)),
            Self::Text(text) => {
                text.trim().parse().map_err(|_| format!("label \"{text}\", expected the place of a choice"))
            }
        }
    }
}

impl Item {
    fn of(line: &str) -> std::result::Result<Self, String> {
        let value: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
        let fields = value.as_object().map(|object| object.keys().cloned().collect::<Vec<_>>().join(", "));
        let record: Record = serde_json::from_value(value)
            .map_err(|_| format!("fields [{}] are of no known task", fields.unwrap_or_default()))?;
        let item = Self::from_record(record)?;
        if item.gold >= item.choices.len() {
            return Err(format!("gold is {}, of {} choices", item.gold, item.choices.len()));
        }
        match item.choices.iter().position(|choice| choice.length == 0) {
            Some(place) => Err(format!("choice {place} is empty")),
            None => Ok(item),
        }
    }

    fn from_record(record: Record) -> std::result::Result<Self, String> {
        Ok(match record {
            Record::Prepared { query, choices, gold } => {
                let asks = query.starts_with("Question:") && !query.trim_end().ends_with("Answer:");
                let line = query.strip_suffix('\n').unwrap_or(&query);
                let context = if asks { format!("{line}\nAnswer:") } else { query };
                Self::continuations(&context, &choices, gold.place()?)
            }
            Record::Options { context_options, continuation, gold } => {
                Self::contexts(&context_options, &continuation, gold.place()?)
            }
            Record::Piqa { goal, sol1, sol2, label } => {
                Self::continuations(&asked(&goal), &[sol1, sol2], label.place()?)
            }
            Record::HellaSwag { activity_label, ctx_a, ctx_b, endings, label } => {
                let context = cleaned(&format!("{activity_label}: {ctx_a} {}", capitalized(&ctx_b)));
                let endings: Vec<String> = endings.iter().map(|ending| cleaned(ending)).collect();
                Self::continuations(&context, &endings, label.place()?)
            }
            Record::WinoGrande { sentence, option1, option2, answer } => {
                let (before, after) = sentence.split_once('_').ok_or("a sentence without a blank, \"_\"")?;
                let contexts = [format!("{before}{option1}"), format!("{before}{option2}")];
                let place = answer.place()?.checked_sub(1).ok_or("answer 0, expected 1 or 2")?;
                Self::contexts(&contexts, after.trim(), place)
            }
            Record::OpenBook { question_stem, choices, answer } => {
                let place = choices.place(&answer)?;
                Self::continuations(&question_stem, &choices.text, place)
            }
            Record::Arc { question, choices, answer } => {
                let place = choices.place(&answer)?;
                Self::continuations(&asked(&question), &choices.text, place)
            }
            Record::BoolQ { passage, question, label } => {
                let context = format!("{passage}\nQuestion: {question}?\nAnswer:");
                Self::continuations(&context, &["no".into(), "yes".into()], label.place()?)
            }
            Record::SciQ { support, question, correct_answer, distractor1, distractor2, distractor3 } => {
                let context = format!("{}\n{}", support.trim_start(), asked(&question));
                Self::continuations(&context, &[distractor1, distractor2, distractor3, correct_answer], 3)
            }
            Record::Copa { premise, choice1, choice2, question, label } => {
                let premise = premise.trim();
                let stem = premise.char_indices().last().map_or("", |(end, _)| &premise[..end]);
                let word = match question {
                    Relation::Cause => "because",
                    Relation::Effect => "therefore",
                };
                // The harness's choices begin with a space, and it puts one before every choice.
                let choices = [choice1, choice2].map(|choice| format!(" {}", uncapitalized(&choice)));
                Self::continuations(&format!("{stem} {word}"), &choices, label.place()?)
            }
            Record::Lambada { text } => {
                let (context, word) = text.rsplit_once(' ').ok_or("a text of one word")?;
                Self::continuations(context, &[word.into()], 0)
            }
        })
    }

    /// One text and several continuations.
    fn continuations(context: &str, choices: &[String], gold: usize) -> Self {
        let choice = |text: &String| Choice {
            context: context.into(),
            continuation: format!(" {text}"),
            length: text.chars().count(),
        };
        Self { choices: choices.iter().map(choice).collect(), gold }
    }

    /// Several texts and one continuation.
    fn contexts(contexts: &[String], continuation: &str, gold: usize) -> Self {
        let choice = |context: &String| Choice {
            context: context.clone(),
            continuation: format!(" {continuation}"),
            length: continuation.chars().count(),
        };
        Self { choices: contexts.iter().map(choice).collect(), gold }
    }
}

impl Lettered {
    fn place(&self, answer: &str) -> std::result::Result<usize, String> {
        let found = self.label.iter().position(|label| label == answer.trim_start());
        found.ok_or_else(|| format!("answerKey \"{answer}\", expected one of {:?}", self.label))
    }
}

fn asked(question: &str) -> String {
    format!("Question: {question}\nAnswer:")
}

/// Without the marks that `WikiHow` left in `HellaSwag`.
fn cleaned(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once('[') {
        let Some((_, beyond)) = after.split_once(']') else { break };
        kept.push_str(before);
        rest = beyond;
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn item(line: &str) -> Item {
        Task::from_json_lines("test", line, None).unwrap().items.remove(0)
    }

    fn texts(item: &Item) -> Vec<(&str, &str)> {
        item.choices.iter().map(|choice| (choice.context.as_str(), choice.continuation.as_str())).collect()
    }

    /// Prompts of lm-evaluation-harness 0.4, filled in by hand.
    #[test]
    fn records_become_the_prompts_of_the_harness() {
        let piqa = item(r#"{"goal": "Boil eggs", "sol1": "Use water.", "sol2": "Use sand.", "label": 0}"#);
        assert_eq!(texts(&piqa)[1], ("Question: Boil eggs\nAnswer:", " Use sand."));
        assert_eq!((piqa.gold, piqa.choices[1].length), (0, 9));

        let arc = item(
            r#"{"question": "Why?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"}"#,
        );
        assert_eq!((texts(&arc)[0], arc.gold), (("Question: Why?\nAnswer:", " x"), 1));

        let open = item(
            r#"{"question_stem": "The sun", "choices": {"label": ["A", "B"], "text": ["is hot", "is wet"]}, "answerKey": "A"}"#,
        );
        assert_eq!(texts(&open)[1], ("The sun", " is wet"));

        let swag = item(
            r#"{"activity_label": "Cooking", "ctx_a": "A man [header] How to stir [title] Begin.", "ctx_b": "the MAN", "endings": ["stirs [step] it.", "sleeps."], "label": "1"}"#,
        );
        let context = "Cooking: A man How to stir.  Begin. The man";
        assert_eq!(texts(&swag)[0], (context.replace("  ", " ").as_str(), " stirs it."));
        assert_eq!(swag.gold, 1);

        let grande = item(
            r#"{"sentence": "Ann thanked Bea as _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"}"#,
        );
        assert_eq!(texts(&grande)[1], ("Ann thanked Bea as Bea", " had helped."));
        assert_eq!(grande.gold, 1);

        let boolq = item(r#"{"passage": "Ice is cold.", "question": "is ice cold", "label": 1}"#);
        assert_eq!(texts(&boolq)[1], ("Ice is cold.\nQuestion: is ice cold?\nAnswer:", " yes"));
        assert_eq!(item(r#"{"passage": "P", "question": "q", "answer": true}"#).gold, 1);

        let sciq = item(
            r#"{"support": " Ice.", "question": "What?", "correct_answer": "ice", "distractor1": "a", "distractor2": "b", "distractor3": "c"}"#,
        );
        assert_eq!((texts(&sciq)[3], sciq.gold), (("Ice.\nQuestion: What?\nAnswer:", " ice"), 3));

        let copa = item(
            r#"{"premise": "It rained. ", "choice1": "Streets got wet.", "choice2": "I ate.", "question": "effect", "label": 0}"#,
        );
        assert_eq!(texts(&copa)[0], ("It rained therefore", "  streets got wet."));

        let lambada = item(r#"{"text": "He opened the door"}"#);
        assert_eq!(texts(&lambada), [("He opened the", " door")]);

        let prepared = item(r#"{"query": "Question: Why?", "choices": ["x", "y"], "gold": 1}"#);
        assert_eq!(texts(&prepared)[1], ("Question: Why?\nAnswer:", " y"));
        let ended = item(r#"{"query": "Question: Why?\n", "choices": ["x", "y"], "gold": 1}"#);
        assert_eq!(ended, prepared);
        let options = item(r#"{"context_options": ["A", "B"], "continuation": "is.", "gold": 0}"#);
        assert_eq!(texts(&options)[1], ("B", " is."));
    }

    #[test]
    fn lines_that_are_no_items_are_refused_by_number() {
        for (line, reason) in [
            ("{", "EOF"),
            (r#"{"query": "x"}"#, "fields [query] are of no known task"),
            (r#"{"query": "x", "choices": ["a"], "gold": 1}"#, "gold is 1, of 1 choices"),
            (r#"{"query": "x", "choices": ["a", ""], "gold": 1}"#, "choice 1 is empty"),
            (r#"{"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}"#, "without a blank"),
            (r#"{"text": "word"}"#, "one word"),
        ] {
            let lines = format!("{{\"text\": \"two words\"}}\n\n{line}\n");
            let error = Task::from_json_lines("test", &lines, None).unwrap_err().to_string();
            assert!(error.contains("line 3") && error.contains(reason), "{error}");
        }
        assert!(Task::from_json_lines("test", "\n \n", None).is_err());
    }
}
