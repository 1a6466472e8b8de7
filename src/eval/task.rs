//! Tasks from JSON Lines: each record becomes texts to continue, and continuations to choose from.

use std::path::Path;

use super::record;
use crate::error::{Error, Result};

/// Items that a model answers by how likely it finds each continuation.
///
/// Records are those of lm-evaluation-harness's datasets, told apart by their fields and turned into text by its
/// prompts, without examples before them: PIQA, ARC, `HellaSwag`, `WinoGrande`, `BoolQ`, `OpenBookQA`, `SciQ`, COPA,
/// LAMBADA. Other fields may stand beside a dataset's own, but for ARC and LAMBADA, whose records would be those of
/// other datasets with them. Prepared records hold `query`, `choices` and `gold` (a query that begins with `Question:`, whether or not
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
    /// Whether the harness has `acc_norm` for its task: not where contexts are chosen from, nor for `BoolQ`, COPA and
    /// LAMBADA.
    pub by_length: bool,
}

/// A continuation of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Choice {
    /// What is given.
    pub context: String,
    /// What follows it, with the space before it.
    pub continuation: String,
    /// The length by which `acc_norm` divides: characters of the choice as the harness has it.
    pub length: usize,
}

impl Task {
    /// Reads a file, `limit` items at most.
    ///
    /// # Errors
    /// A file that cannot be read, a line that is no record of a known task or has no answer, items with one choice
    /// beside items with several, no line at all, or a limit of 0.
    pub fn read(path: impl AsRef<Path>, limit: Option<usize>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        Self::from_json_lines(name, &text, limit).map_err(|error| match error {
            Error::Text(reason) => Error::format(path, reason),
            other => other,
        })
    }

    /// Reads files of one task each, `limit` items of each at most.
    ///
    /// # Errors
    /// As [`read`](Self::read), and two files of one stem: results go by the tasks' names.
    pub fn read_all(paths: &[impl AsRef<Path>], limit: Option<usize>) -> Result<Vec<Self>> {
        let mut tasks: Vec<Self> = Vec::with_capacity(paths.len());
        for path in paths {
            let (path, task) = (path.as_ref(), Self::read(path, limit)?);
            // Every file before this one has given a task.
            if let Some((other, _)) = paths.iter().zip(&tasks).find(|(_, other)| other.name == task.name) {
                let (name, other) = (&task.name, other.as_ref().display());
                let reason = format!("its task is {name}, as that of {other} is, expected different names");
                return Err(Error::format(path, reason));
            }
            tasks.push(task);
        }
        Ok(tasks)
    }

    /// Reads JSON Lines, `limit` items at most. A byte-order mark before them is passed over.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn from_json_lines(name: impl Into<String>, text: &str, limit: Option<usize>) -> Result<Self> {
        if limit == Some(0) {
            return Err(Error::argument("limit", 0, "1 item or more"));
        }
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let mut items: Vec<Item> = Vec::new();
        for (index, line) in lines.take(limit.unwrap_or(usize::MAX)) {
            let refused = |reason: String| Error::Text(format!("line {}: {reason}", index + 1));
            let item = record::item(line).map_err(refused)?;
            // Of one choice a model is asked whether it would say it: no mean is one of both.
            let several = |item: &Item| item.choices.len() > 1;
            if items.first().is_some_and(|first| several(first) != several(&item)) {
                let before = if several(&item) { "one" } else { "several" };
                let reason = format!("choices are {}, expected {before} as before", item.choices.len());
                return Err(refused(reason));
            }
            items.push(item);
        }
        if items.is_empty() {
            return Err(Error::Text("no items, expected JSON Lines".into()));
        }
        Ok(Self { name: name.into(), items })
    }
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

    /// Of the datasets whose definitions in lm-evaluation-harness 0.4.13 list `acc_norm`.
    #[test]
    fn choices_have_lengths_where_the_harness_divides_by_them() {
        for (line, by_length) in [
            (r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}"#, true),
            (r#"{"sentence": "a _ c", "option1": "a", "option2": "b", "answer": "1"}"#, false),
            (r#"{"context_options": ["a", "b"], "continuation": "c", "gold": 0}"#, false),
            (r#"{"passage": "p", "question": "q", "label": 0}"#, false),
            (r#"{"premise": "p.", "choice1": "a", "choice2": "b", "question": "cause", "label": 0}"#, false),
            (r#"{"text": "two words", "domain": "news"}"#, false),
            (r#"{"query": "q", "choices": ["a"], "gold": 0}"#, false),
            (r#"{"query": "q", "choices": ["a", "b"], "gold": 0}"#, true),
        ] {
            assert_eq!(item(line).by_length, by_length, "{line}");
        }
    }

    #[test]
    fn brackets_are_dropped_as_by_the_regular_expression_of_the_harness() {
        // re.sub("\\[.*?\\]", "", text) of Python 3: a dot is no line's end.
        let swag = item(
            r#"{"activity_label": "A", "ctx_a": "b [c\nd] [e] f [g", "ctx_b": "", "endings": ["h", "i"], "label": 0}"#,
        );
        assert_eq!(texts(&swag)[0].0, "A: b [c\nd] f [g");
    }

    #[test]
    fn a_byte_order_mark_is_passed_over() {
        let line = r#"{"text": "two words"}"#;
        let marked = Task::from_json_lines("test", &format!("\u{feff}{line}"), None).unwrap();
        assert_eq!(marked.items, [item(line)]);
    }

    #[test]
    fn items_with_one_choice_and_with_several_are_no_task() {
        let (one, two) = (
            r#"{"query": "q", "choices": ["a"], "gold": 0}"#,
            r#"{"query": "q", "choices": ["a", "b"], "gold": 0}"#,
        );
        for (lines, reason) in
            [([one, two], "choices are 2, expected one"), ([two, one], "choices are 1, expected several")]
        {
            let error = Task::from_json_lines("test", &lines.join("\n"), None).unwrap_err().to_string();
            assert!(error.contains("line 2") && error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_limit_of_nothing_is_refused_by_name() {
        let error = Task::from_json_lines("test", r#"{"text": "two words"}"#, Some(0)).unwrap_err();
        assert_eq!(error.to_string(), "limit is 0, expected 1 item or more");
    }

    #[test]
    fn lines_that_are_no_items_are_refused_by_number() {
        for (line, reason) in [
            ("{", "EOF"),
            ("[1]", "no JSON object"),
            (r#"{"query": "x"}"#, "fields [query] are of no known task"),
            (r#"{"text": "a film", "label": 1}"#, "fields [text, label] are of no known task"),
            (
                r#"{"question": "q", "question_concept": "c", "choices": {"label": [], "text": []}, "answerKey": "A"}"#,
                "of no known task",
            ),
            (
                r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": -1}"#,
                "label is -1, which is no answer, expected the place of a choice",
            ),
            (
                r#"{"sentence": "a _ c", "option1": "a", "option2": "b", "answer": ""}"#,
                "answer is \"\", which is no answer",
            ),
            (
                r#"{"question_stem": "q", "choices": {"label": ["A"], "text": ["a"]}, "answerKey": ""}"#,
                "answerKey is \"\", which is no answer, expected one of [\"A\"]",
            ),
            (r#"{"goal": "g", "sol1": "a", "sol2": "b"}"#, "a record of PIQA: missing field `label`"),
            (
                r#"{"premise": "p.", "choice1": "", "choice2": "b", "question": "cause", "label": 0}"#,
                "choice 0 is empty",
            ),
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
