//! The words of `words.txt` and the facts that one story draws from them.

use std::{collections::HashMap, sync::LazyLock};

use rand::Rng;

static TABLES: LazyLock<HashMap<&'static str, Vec<&'static str>>> =
    LazyLock::new(|| include_str!("words.txt").split("\n[").filter_map(read_table).collect());

const NUMBERS: [&str; 10] = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];

fn read_table(section: &'static str) -> Option<(&'static str, Vec<&'static str>)> {
    let (name, body) = section.split_once("]\n")?;
    Some((name, body.split(',').map(str::trim).filter(|word| !word.is_empty()).collect()))
}

/// The entries of one table of `words.txt`; none when there is no such table.
pub fn table(name: &str) -> &'static [&'static str] {
    TABLES.get(name).map_or(&[], Vec::as_slice)
}

/// One of `choices`, the empty string when there are none. Draws a `u32`: the same choice on every platform.
pub fn pick<'a>(rng: &mut impl Rng, choices: &[&'a str]) -> &'a str {
    if choices.is_empty() { "" } else { choices[rng.random_range(0..choices.len() as u32) as usize] }
}

/// An index below `length`, the least of three draws: as in any language, some words are much more common.
fn early_index(rng: &mut impl Rng, length: usize) -> usize {
    let mut draw = || rng.random_range(0..length as u32) as usize;
    draw().min(draw()).min(draw())
}

/// One entry of a table, the earlier the likelier.
fn pick_word(rng: &mut impl Rng, name: &str) -> &'static str {
    pick_different(rng, name, 1).first().copied().unwrap_or_default()
}

/// `count` different entries of a table (which must have as many).
fn pick_different(rng: &mut impl Rng, name: &str, count: usize) -> Vec<&'static str> {
    let mut left = table(name).to_vec();
    let count = count.min(left.len());
    (0..count).map(|_| left.remove(early_index(rng, left.len()))).collect()
}

/// `words` after "a" or "an".
pub fn with_article(words: &str) -> String {
    let silent = ["honest", "hour"].iter().any(|start| words.starts_with(start));
    let article = if silent || words.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {words}")
}

/// The word for a number up to nine.
pub fn number_word(number: u32) -> &'static str {
    NUMBERS.get(number as usize).copied().unwrap_or("many")
}

/// What is true in one story: each slot of the grammar with its words.
#[derive(Debug, Default, Clone)]
pub struct Facts(HashMap<String, String>);

impl Facts {
    /// Draws everything a story may need; it takes place in bad light if `dim`.
    pub fn draw(rng: &mut impl Rng, dim: bool) -> Self {
        let mut facts = Self::default();
        facts.draw_people(rng);
        facts.draw_pet(rng);
        facts.draw_setting(rng, dim);
        facts.draw_things(rng);
        facts.draw_counts(rng);
        facts.draw_boxes(rng);
        facts.draw_ranking(rng);
        for (name, forms) in [
            ("trait", &["trait", "virtue"][..]),
            ("wish", &["wish", "wished"]),
            ("task", &["task", "tasked"]),
            ("call", &["call", "callnoun"]),
            ("food", &["food"]),
            ("container", &["container"]),
        ] {
            facts.set_forms(pick_word(rng, name), forms);
        }
        facts
    }

    /// The words of a slot.
    pub fn get(&self, slot: &str) -> Option<&str> {
        self.0.get(slot).map(String::as_str)
    }

    fn set(&mut self, slot: impl Into<String>, words: impl Into<String>) {
        self.0.insert(slot.into(), words.into());
    }

    fn copy(&mut self, from: &str, to: &str) {
        let words = self.get(from).unwrap_or_default().to_owned();
        self.set(to, words);
    }

    /// Sets one slot for each `|` form of `entry`.
    fn set_forms(&mut self, entry: &str, slots: &[&str]) {
        for (slot, form) in slots.iter().zip(entry.split('|')) {
            self.set(*slot, form);
        }
    }

    fn set_pronouns(&mut self, prefix: &str, she: bool) {
        let forms = if she { ["she", "her", "her"] } else { ["he", "him", "his"] };
        for (case, form) in ["he", "him", "his"].into_iter().zip(forms) {
            self.set(format!("{prefix}{case}"), form);
        }
    }

    fn draw_people(&mut self, rng: &mut impl Rng) {
        let women = pick_different(rng, "she", 4);
        let men = pick_different(rng, "he", 4);
        let people = [("hero", ""), ("friend", "f."), ("rival", "rival."), ("elder", "e.")];
        for (index, (slot, prefix)) in people.into_iter().enumerate() {
            let she = rng.random_bool(0.5);
            let name = if she { women[index] } else { men[index] };
            self.set_pronouns(prefix, she);
            match slot {
                "elder" => {
                    let title = pick_word(rng, if she { "elder.she" } else { "elder.he" });
                    self.set(slot, format!("{title} {name}"));
                }
                _ => self.set(slot, name),
            }
            if slot == "hero" {
                self.set("child", if she { "girl" } else { "boy" });
            }
            // The race speaks of each runner by rank.
            self.set_pronouns(&format!("{slot}."), she);
        }
    }

    fn draw_pet(&mut self, rng: &mut impl Rng) {
        for slot in ["pet", "species", "petlook", "sign"] {
            self.set(slot, pick_word(rng, slot));
        }
        self.set_pronouns("p.", rng.random_bool(0.5));
    }

    fn draw_setting(&mut self, rng: &mut impl Rng, dim: bool) {
        let weathers: Vec<&str> =
            table("weather").iter().copied().filter(|entry| !dim || entry.ends_with("|dim")).collect();
        self.set_forms(pick(rng, &weathers), &["day", "weather", "sky", "seasons"]);
        let seasons: Vec<String> =
            self.get("seasons").unwrap_or_default().split(' ').map(str::to_owned).collect();
        let season = pick(rng, &seasons.iter().map(String::as_str).collect::<Vec<_>>()).to_owned();
        let others: Vec<&str> = table("season").iter().copied().filter(|other| *other != season).collect();
        self.set("season2", pick(rng, &others));
        self.set("season", season);
        self.set("settle", pick_word(rng, "settle"));
        self.set_forms(&pick_different(rng, "town", 2).join("|"), &["town", "town2"]);
        for (index, place) in pick_different(rng, "place", 4).into_iter().enumerate() {
            let (position, place) = place.split_once('|').unwrap_or(("near", place));
            self.set(format!("place{}", index + 1), place);
            self.set(format!("at{}", index + 1), format!("{position} {place}"));
        }
    }

    fn draw_things(&mut self, rng: &mut impl Rng) {
        self.set_forms(&pick_different(rng, "thing", 3).join("|"), &["thing", "thing2", "thing3"]);
        self.set_forms(&pick_different(rng, "look", 3).join("|"), &["look", "look2", "look3"]);
        self.set("mark", pick_word(rng, "mark"));
        for (index, entry) in pick_different(rng, "good", 3).into_iter().enumerate() {
            let (good, short) = entry.split_once('|').unwrap_or((entry, entry));
            self.set(format!("good{}", index + 1), good);
            self.set(format!("short{}", index + 1), short);
            self.set(format!("short{}.was", index + 1), if short.ends_with('s') { "were" } else { "was" });
        }
    }

    /// `start - gave = rest`, `rest + found = end`, `end - gave2 = left2`, all from one to nine.
    fn draw_counts(&mut self, rng: &mut impl Rng) {
        let (item, items) = pick_word(rng, "item").split_once('|').unwrap_or(("thing", "things"));
        self.set("item", item);
        self.set("items", items);
        let start = rng.random_range(2..=9u32);
        let gave = rng.random_range(1..start);
        let rest = start - gave;
        let found = rng.random_range(1..=9 - rest);
        let end = rest + found;
        let gave2 = rng.random_range(1..end);
        let counts = [
            ("start", start),
            ("gave", gave),
            ("rest", rest),
            ("found", found),
            ("end", end),
            ("gave2", gave2),
            ("left2", end - gave2),
        ];
        for (slot, count) in counts {
            let (noun, verb) = if count == 1 { (item, "was") } else { (items, "were") };
            self.set(slot, format!("{} {noun}", number_word(count)));
            self.set(format!("{slot}.were"), verb);
        }
        let (hero, friend) = (self.get("hero").unwrap_or_default(), self.get("friend").unwrap_or_default());
        let compare = match rest.cmp(&found) {
            std::cmp::Ordering::Less => format!("it was {friend}, with {}.", number_word(found)),
            std::cmp::Ordering::Equal => "both had found the same number.".to_owned(),
            std::cmp::Ordering::Greater => format!("it was {hero}, with {}.", number_word(rest)),
        };
        self.set("compare", compare);
        self.set("days", format!("{} days", number_word(rng.random_range(2..=9))));
    }

    /// Three colours, and which of the three boxes the questions are about.
    fn draw_boxes(&mut self, rng: &mut impl Rng) {
        self.set_forms(&pick_different(rng, "color", 3).join("|"), &["color1", "color2", "color3"]);
        let asked = rng.random_range(0..3u32);
        let other = (asked + rng.random_range(1..3u32)) % 3;
        for (slot, index) in [("pick", asked as usize), ("other", other as usize)] {
            self.copy(["color1", "color2", "color3"][index], &format!("{slot}color"));
            self.copy(["thing", "thing2", "thing3"][index], &format!("{slot}thing"));
        }
    }

    /// Who wins the race, who is second and who is third.
    fn draw_ranking(&mut self, rng: &mut impl Rng) {
        let mut runners = vec!["hero", "friend", "rival"];
        for rank in ["first", "second", "third"] {
            let runner = runners.swap_remove(rng.random_range(0..runners.len() as u32) as usize);
            self.copy(runner, rank);
            self.copy(&format!("{runner}.he"), &format!("{rank}.he"));
        }
    }
}
