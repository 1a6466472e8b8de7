//! The plots of `grammar.txt`: how they are read and how a line becomes sentences.

use std::{fmt::Write, sync::LazyLock};

use rand::Rng;

use super::words::{Facts, pick, with_article};

/// One part of a plot and the ways to tell it.
#[derive(Debug, Clone)]
pub struct Role {
    optional: bool,
    lines: Vec<&'static str>,
}

/// A named sequence of roles.
#[derive(Debug, Clone)]
pub struct Plot {
    /// What the grammar calls the plot.
    pub name: &'static str,
    roles: Vec<Role>,
}

static PLOTS: LazyLock<Vec<Plot>> = LazyLock::new(|| read(include_str!("grammar.txt")));

/// All plots, in the order of the grammar.
pub fn plots() -> &'static [Plot] {
    &PLOTS
}

fn read(source: &'static str) -> Vec<Plot> {
    let mut shared: Vec<(&str, Role)> = Vec::new();
    let mut plots = Vec::new();
    for section in source.split("\n== ").skip(1) {
        let (heading, body) = section.split_once('\n').unwrap_or((section, ""));
        let roles =
            body.split("\n\n").map(|role| read_role(role, &shared)).filter(|role| !role.lines.is_empty());
        match heading.split_once(' ') {
            Some(("shared", name)) => {
                let roles: Vec<Role> = roles.collect();
                shared.extend(roles.into_iter().map(|role| (name, role)));
            }
            Some((_, name)) => plots.push(Plot { name, roles: roles.collect() }),
            None => {}
        }
    }
    plots
}

fn read_role(text: &'static str, shared: &[(&str, Role)]) -> Role {
    let mut lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    if let [line] = lines[..]
        && let Some(name) = line.strip_prefix('@')
        && let Some((_, role)) = shared.iter().find(|(known, _)| *known == name)
    {
        return role.clone();
    }
    let optional = lines.first() == Some(&"?");
    if optional {
        lines.remove(0);
    }
    Role { optional, lines }
}

impl Plot {
    /// Tells the plot with `facts`.
    pub fn tell(&self, rng: &mut impl Rng, facts: &Facts) -> String {
        let mut text = String::new();
        for role in &self.roles {
            if role.optional && !rng.random_ratio(1, 3) {
                continue;
            }
            if !text.is_empty() {
                text.push(' ');
            }
            let line = pick(rng, &role.lines);
            let worded = choose_wording(rng, line);
            fill(&mut text, &worded, facts);
        }
        text
    }
}

/// Replaces every `[x|y]` by one of its wordings.
fn choose_wording(rng: &mut impl Rng, line: &str) -> String {
    let mut worded = String::new();
    let mut rest = line;
    while let Some((before, (choices, after))) =
        rest.split_once('[').and_then(|(before, tail)| Some((before, tail.split_once(']')?)))
    {
        worded.push_str(before);
        worded.push_str(pick(rng, &choices.split('|').collect::<Vec<_>>()));
        rest = after;
    }
    worded + rest
}

/// Appends `line` to `text` with its `{slots}` filled; a slot without a fact stays as it is.
fn fill(text: &mut String, line: &str, facts: &Facts) {
    let mut rest = line;
    while let Some((before, (slot, after))) =
        rest.split_once('{').and_then(|(before, tail)| Some((before, tail.split_once('}')?)))
    {
        text.push_str(before);
        match slot_value(slot, facts) {
            Some(value) => text.push_str(&value),
            None => drop(write!(text, "{{{slot}}}")),
        }
        rest = after;
    }
    text.push_str(rest);
}

/// `slot` as written in a line: `name`, `a:name`, or either with a capital for the start of a sentence.
fn slot_value(slot: &str, facts: &Facts) -> Option<String> {
    let key = slot.to_lowercase();
    let value = match key.strip_prefix("a:") {
        Some(name) => with_article(facts.get(name)?),
        None => facts.get(&key)?.to_owned(),
    };
    Some(if slot.starts_with(char::is_uppercase) { capitalized(&value) } else { value })
}

fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
