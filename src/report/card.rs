//! The model card of what a pipeline saves.

use std::fmt::Write;
use std::path::Path;

use super::number::{fixed, list};
use super::{escape, markdown, roles, words};
use crate::checkpoint::{ModelCard, name_of, tags};
use crate::pipeline::Report;
use crate::plan::Plan;

/// What a plan does, as facts for a model card.
pub(crate) fn plan_facts(plan: &Plan) -> Vec<(&'static str, String)> {
    let mut facts = roles::removed(plan);
    facts.extend(plan.scores().map(|scores| ("chosen by", escape::code(&scores.method))));
    let Some(sharing) = plan.sharing().filter(|sharing| !sharing.groups.is_empty()) else { return facts };
    let groups = sharing.groups.iter().map(|group| format!("{}: {}", list(&group.blocks), group.donor));
    facts.extend(groups.map(|group| ("blocks that share matrices", group)));
    facts.push(("what blocks that share keep", sharing.own.to_string()));
    facts
}

/// Which of so many blocks are gone where only `kept` are left, as facts for a model card without a plan. None where
/// all are there: others may have gone before.
pub(crate) fn removed_facts(depth: usize, kept: &[usize]) -> Vec<(&'static str, String)> {
    let gone: Vec<usize> = (0..depth).filter(|block| !kept.contains(block)).collect();
    if gone.is_empty() { Vec::new() } else { vec![roles::removed_blocks(&gone)] }
}

impl Report {
    /// The card of the compressed model: what it was made of and how, its results and their protocol. Paths of this
    /// machine stay out of it.
    pub(crate) fn model_card(&self, base_model: Option<String>) -> ModelCard {
        let name = base_model.clone().unwrap_or_else(|| self.model_name().to_string());
        let mut card = ModelCard::new(format!("{name}, compressed"));
        let shared = self.plan.sharing().is_some_and(|sharing| !sharing.groups.is_empty());
        card.tags = tags(!self.plan.units().is_empty(), shared);
        if self.recipe.heal.as_ref().is_some_and(|heal| heal.losses.need_teacher()) {
            card.tags.push("knowledge-distillation".into());
        }
        let (summary, version) = (escape::markdown(&self.summary()), escape::markdown(&self.version));
        let _ = write!(card.body, "{summary}\n\n## What was done\n\n{}", self.done(&name));
        let _ = write!(card.body, "\n## Results\n{}", markdown::parts(&self.before_and_after()));
        let _ = write!(card.body, "\n## Protocol\n{}", markdown::parts(&self.protocol()));
        let _ = write!(
            card.body,
            "\nMade with foldgpt {version}. The base model's license holds for this one too."
        );
        card.base_model = base_model;
        card
    }

    fn done(&self, name: &str) -> String {
        let (plan, recipe) = (&self.plan, &self.recipe);
        let mut facts = vec![
            ("base model", escape::code(name)),
            ("base model's weights, sha256", escape::code(&self.model_sha256)),
        ];
        facts.extend(plan_facts(plan));
        facts.extend(recipe.heal.iter().map(|heal| ("healed", escape::markdown(&words::heal(heal)))));
        if let Some(heal) = &self.heal {
            let trained = format!(
                "{} numbers on {} tokens",
                fixed(heal.trained as f64, 0),
                fixed(heal.tokens as f64, 0)
            );
            facts.push(("trained", trained));
        }
        let text = name_of(Path::new(&recipe.text)).unwrap_or_default();
        facts.push(("text", escape::code(&text)));
        facts.push(("seed", recipe.seed.to_string()));
        facts.iter().fold(String::new(), |mut list, (name, fact)| {
            let _ = writeln!(list, "- {name}: {fact}");
            list
        })
    }
}
