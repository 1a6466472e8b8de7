//! Model cards: the `README.md` of a saved directory, as the Hugging Face hub reads it.

use std::fmt::Write;
use std::path::Path;

use super::written::Written;
use super::{Checkpoint, Format, hub};
use crate::model::{Architecture, Decoder, Unit};
use crate::plan::Plan;
use crate::report::{escape, plan_facts, removed_facts};

/// The card's file.
pub(crate) const CARD: &str = "README.md";
/// The tag of every model that this crate wrote.
const TAG: &str = "foldgpt";

/// What a model card says. Its front matter (YAML: library, base model, tags) is what the hub reads; how the model is
/// loaded follows from its format and is added when it is written.
///
/// ```
/// use foldgpt::Format;
/// use foldgpt::checkpoint::ModelCard;
///
/// let mut card = ModelCard::new("name, made smaller");
/// card.base_model = Some("org/name".into());
/// card.body = "It lost *two* blocks.".into();
/// let text = card.to_markdown(Format::Expanded);
/// assert!(text.starts_with("---\nlibrary_name: transformers\n"));
/// assert!(text.contains("\nbase_model: \"org/name\"\n"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelCard {
    /// The title, as plain text.
    pub title: String,
    /// The hub id of the model that this one was made of.
    pub base_model: Option<String>,
    /// Tags besides `foldgpt`.
    pub tags: Vec<String>,
    /// What is said below the title, as Markdown.
    pub body: String,
}

impl ModelCard {
    /// A card that says nothing yet.
    #[must_use]
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), base_model: None, tags: Vec::new(), body: String::new() }
    }

    /// The card of a model in this format.
    #[must_use]
    pub fn to_markdown(&self, format: Format) -> String {
        let library = match format {
            Format::Expanded => "transformers",
            Format::Compact => TAG,
        };
        let mut text = format!("---\nlibrary_name: {library}\npipeline_tag: text-generation\n");
        if let Some(base) = &self.base_model {
            let _ = writeln!(text, "base_model: {}", quoted(base));
        }
        let _ = writeln!(text, "tags:\n- {TAG}");
        for tag in self.tags.iter().filter(|tag| *tag != TAG) {
            let _ = writeln!(text, "- {}", quoted(tag));
        }
        let (title, body) = (escape::markdown(&self.title), self.body.trim_end());
        let _ = write!(text, "---\n\n# {title}\n\n{body}\n\n## How to load it\n\n{}", loading(format));
        text
    }
}

impl Checkpoint {
    /// The hub id that this model was fetched by, or that the model was made of that this crate wrote here.
    pub(crate) fn base_model(&self) -> Option<String> {
        let names = self.location.iter().filter_map(|part| part.to_str());
        let fetched = names.filter_map(|part| part.strip_prefix("models--")).next_back();
        let id = match fetched {
            Some(name) => name.replacen("--", "/", 1),
            None => base_of_card(&std::fs::read_to_string(self.location.join(CARD)).ok()?)?,
        };
        hub::is_hub_id(&id).then_some(id)
    }

    /// The card of `decoder`, made from this checkpoint: what was done, and no results. Whoever has some adds them to its
    /// body and gives it to [`SaveOptions::card`](super::SaveOptions::card).
    #[must_use]
    pub fn card(&self, decoder: &Decoder, plan: Option<&Plan>) -> ModelCard {
        self.card_of(decoder.architecture(), &decoder.origins(), plan)
    }

    /// The card of what nobody says anything about.
    pub(super) fn unmeasured(&self, written: &Written<'_>, plan: Option<&Plan>) -> ModelCard {
        let mut card = self.card_of(&written.model, &written.kept, plan);
        card.body += " Its quality was not measured when it was written.";
        card
    }

    /// The card of a model whose depths are the blocks `kept` of this one.
    fn card_of(&self, model: &Architecture, kept: &[usize], plan: Option<&Plan>) -> ModelCard {
        let base_model = self.base_model();
        let name = base_model.clone().or_else(|| name_of(&self.location));
        let mut card = match &name {
            Some(name) => ModelCard::new(format!("{name}, compressed")),
            None => ModelCard::new("A language model"),
        };
        if let Some(name) = &name {
            let _ = writeln!(card.body, "- base model: {}", escape::code(name));
        }
        let _ = writeln!(card.body, "- blocks: {} of {}", model.depth(), self.architecture.depth());
        let _ = writeln!(card.body, "- parameters: {}", model.parameter_count());
        if let Some(sha256) = plan.and_then(Plan::model_sha256) {
            let _ = writeln!(card.body, "- base model's weights, sha256: {}", escape::code(sha256));
        }
        let facts = plan.map_or_else(|| removed_facts(self.architecture.depth(), kept), plan_facts);
        for (name, fact) in facts {
            let _ = writeln!(card.body, "- {name}: {fact}");
        }
        let _ = write!(card.body, "\nMade with foldgpt {}.", env!("CARGO_PKG_VERSION"));
        let shares = (0..model.depth()).any(|depth| model.fold.block(depth).weights != depth);
        card.tags = tags(halves(model) < halves(&self.architecture), shares);
        card.base_model = base_model;
        card
    }
}

/// How many attentions and MLPs a model has.
fn halves(arch: &Architecture) -> usize {
    let there = |half: &Unit| arch.fold.block(half.block).has(half.part);
    Unit::halves(arch.depth()).into_iter().filter(there).count()
}

/// The tags of what was done.
pub(crate) fn tags(removed: bool, shared: bool) -> Vec<String> {
    let done = [("depth-pruning", removed), ("weight-sharing", shared)];
    done.into_iter().filter(|(_, done)| *done).map(|(tag, _)| tag.to_string()).collect()
}

/// The name of a file or directory: where it lies is nobody's business.
pub(crate) fn name_of(path: &Path) -> Option<String> {
    path.file_name().map(|name| name.to_string_lossy().into_owned())
}

/// The base model that a card of this crate names.
fn base_of_card(card: &str) -> Option<String> {
    let (front, _) = card.strip_prefix("---\n")?.split_once("\n---\n")?;
    let ours = front.lines().any(|line| line == "- foldgpt");
    let base = front.lines().find_map(|line| line.strip_prefix("base_model: "));
    base.filter(|_| ours).and_then(|base| serde_json::from_str(base).ok())
}

/// A scalar of YAML. JSON's strings are such.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn loading(format: Format) -> &'static str {
    match format {
        Format::Expanded => {
            "```python\n\
             from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             directory = \"path/to/this/directory\"\n\
             tokenizer = AutoTokenizer.from_pretrained(directory)\n\
             model = AutoModelForCausalLM.from_pretrained(directory)\n\
             ```\n"
        }
        Format::Compact => {
            "Tensors that blocks share are stored once, which other readers do not know. With foldgpt:\n\n\
             ```rust\n\
             use foldgpt::{Checkpoint, candle::{DType, Device}};\n\n\
             let checkpoint = Checkpoint::open(\"path/to/this/directory\")?;\n\
             let decoder = checkpoint.decoder(DType::F32, &Device::Cpu)?;\n\
             ```\n"
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_base_model_is_read_from_our_own_cards_alone() {
        let mut card = ModelCard::new("title");
        assert_eq!(base_of_card(&card.to_markdown(Format::Expanded)), None);
        card.base_model = Some("org/name".into());
        let text = card.to_markdown(Format::Compact);
        assert_eq!(base_of_card(&text).unwrap(), "org/name");
        assert_eq!(base_of_card(&text.replace("- foldgpt", "- other")), None);
        assert_eq!(base_of_card("base_model: \"org/name\""), None);
    }
}
