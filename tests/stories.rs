//! The stories the embedded model learns: reproducible, grammatical, true to their own facts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../examples/stories/mod.rs"]
mod stories;

use std::collections::HashSet;

use rand::{SeedableRng, rngs::StdRng};
use stories::{END, Tale, ngram, words};

fn tales(seed: u64, count: usize) -> Vec<Tale> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| stories::tale(&mut rng)).collect()
}

fn number(tale: &Tale, slot: &str) -> u32 {
    let word = tale.facts.get(slot).unwrap().split(' ').next().unwrap();
    (0..=9).find(|&number| words::number_word(number) == word).unwrap()
}

#[test]
fn same_seed_same_bytes() {
    let text = stories::corpus(1, 50_000);
    assert_eq!(text, stories::corpus(1, 50_000));
    assert_ne!(text, stories::corpus(2, 50_000));
    assert!(stories::corpus(1, 80_000).starts_with(&text));
}

#[test]
fn stories_are_separated_by_the_end_marker() {
    let text = stories::corpus(3, 50_000);
    assert!(text.len() >= 50_000 && text.ends_with(END));
    for story in text.strip_suffix(END).unwrap().split(END) {
        assert!(story.starts_with(char::is_uppercase), "{story}");
        assert!(story.ends_with(['.', '"', '!']), "{story}");
        assert!(!story.contains('\n'));
    }
}

#[test]
fn training_and_held_out_seeds_share_no_story() {
    let train = stories::corpus(1, 1 << 20);
    let held_out = stories::corpus(2, 100_000);
    let seen: HashSet<&str> = train.split_terminator(END).collect();
    assert!(held_out.split_terminator(END).all(|story| !seen.contains(story)));
}

#[test]
fn no_slot_or_choice_is_left_over() {
    for tale in tales(4, 3000) {
        assert!(!tale.text.contains(['{', '}', '[', ']', '|', '@', '_']), "{}: {}", tale.plot, tale.text);
        assert!(!tale.text.contains("  "), "{}", tale.text);
        assert_eq!(tale.text.matches('"').count() % 2, 0, "{}", tale.text);
    }
}

#[test]
fn articles_fit_the_next_word() {
    for tale in tales(5, 3000) {
        let plain = tale.text.replace(['"', ',', '.', '!', '?'], "").to_lowercase();
        let words: Vec<&str> = plain.split(' ').collect();
        for pair in words.windows(2) {
            let vowel =
                pair[1].starts_with(['a', 'e', 'i', 'o', 'u']) || pair[1] == "hour" || pair[1] == "honest";
            assert!(pair[0] != "a" || !vowel, "a {}: {}", pair[1], tale.text);
            assert!(pair[0] != "an" || vowel, "an {}: {}", pair[1], tale.text);
        }
    }
}

#[test]
fn sentences_start_with_a_capital() {
    for tale in tales(6, 3000) {
        for sentence in tale.text.split(". ") {
            let first = sentence.trim_start_matches('"');
            assert!(first.starts_with(char::is_uppercase), "{}: {}", sentence, tale.text);
        }
    }
}

#[test]
fn stories_have_a_pleasant_length() {
    let lengths: Vec<usize> = tales(7, 3000).iter().map(|tale| tale.text.split(' ').count()).collect();
    assert!(lengths.iter().all(|length| (60..=180).contains(length)), "{:?}", lengths.iter().max());
    let mean = lengths.iter().sum::<usize>() / lengths.len();
    assert!((70..=130).contains(&mean), "{mean}");
}

#[test]
fn every_plot_is_told() {
    let told: HashSet<&str> = tales(8, 500).iter().map(|tale| tale.plot).collect();
    assert_eq!(told.len(), stories::grammar::plots().len());
    assert!(told.len() >= 6);
}

/// Every count of the story's item in its text, such as 3 for "three apples"; the noun must fit the number.
fn counts_in_text(tale: &Tale) -> Vec<u32> {
    let (item, items) = (tale.facts.get("item").unwrap(), tale.facts.get("items").unwrap());
    let plain = tale.text.replace(['"', ',', '.', '!', '?'], "").to_lowercase();
    let mut counts = Vec::new();
    for count in 1..=9 {
        let (right, wrong) = if count == 1 { (item, items) } else { (items, item) };
        let word = words::number_word(count);
        assert!(!format!(" {plain} ").contains(&format!(" {word} {wrong} ")), "{}", tale.text);
        let found =
            plain.match_indices(&format!("{word} {right}")).map(|(at, _)| (at, count)).collect::<Vec<_>>();
        counts.extend(found);
    }
    counts.sort_unstable();
    counts.into_iter().map(|(_, count)| count).collect()
}

#[test]
fn counts_add_up() {
    for tale in tales(9, 3000) {
        let of = |slot| number(&tale, slot);
        assert_eq!(of("start"), of("gave") + of("rest"));
        assert_eq!(of("end"), of("rest") + of("found"));
        assert_eq!(of("end"), of("gave2") + of("left2"));
        let told = counts_in_text(&tale);
        match tale.plot {
            "share" => {
                assert_eq!(told.first(), Some(&of("start")), "{}", tale.text);
                assert_eq!(told.last(), Some(&(of("start") - of("gave") + of("found"))), "{}", tale.text);
            }
            "harvest" => {
                assert!(told.contains(&of("rest")) && told.contains(&of("found")), "{}", tale.text);
                assert!(told.contains(&(of("rest") + of("found"))), "{}", tale.text);
                assert_eq!(told.last(), Some(&(of("rest") + of("found") - of("gave2"))), "{}", tale.text);
            }
            _ => {}
        }
    }
}

#[test]
fn lists_are_repeated_in_order() {
    for tale in tales(12, 3000).iter().filter(|tale| tale.plot == "errand") {
        let shorts = ["short1", "short2", "short3"].map(|slot| tale.facts.get(slot).unwrap());
        let goods = ["good1", "good2", "good3"].map(|slot| tale.facts.get(slot).unwrap());
        let [first, second, third] = goods.map(|good| tale.text.find(good).unwrap());
        assert!(first < second && second < third, "{}", tale.text);
        assert!(
            shorts.iter().all(|short| tale.text.to_lowercase().matches(short).count() >= 4),
            "{}",
            tale.text
        );
    }
}

#[test]
fn what_was_lost_is_what_is_found() {
    for tale in tales(10, 3000).iter().filter(|tale| tale.plot == "lost") {
        let lost = format!("{} {}", tale.facts.get("look").unwrap(), tale.facts.get("thing").unwrap());
        let mark = tale.facts.get("mark").unwrap();
        assert!(tale.text.matches(&lost).count() >= 2, "{lost}: {}", tale.text);
        assert_eq!(tale.text.matches(mark).count(), 2, "{mark}: {}", tale.text);
    }
}

#[test]
fn pronouns_follow_the_hero() {
    for tale in tales(11, 1000) {
        let she = tale.facts.get("child") == Some("girl");
        assert_eq!(tale.facts.get("he"), Some(if she { "she" } else { "he" }));
        assert_eq!(words::table("she").contains(&tale.facts.get("hero").unwrap()), she);
    }
}

#[test]
fn there_are_enough_words() {
    let at_least = |name: &str, count| {
        let entries = words::table(name);
        let different: HashSet<_> = entries.iter().collect();
        assert_eq!(different.len(), entries.len(), "{name} repeats an entry");
        assert!(entries.len() >= count, "{name}: {}", entries.len());
    };
    for (name, count) in [("she", 30), ("he", 30), ("thing", 80), ("place", 40), ("look", 40), ("good", 30)] {
        at_least(name, count);
    }
    for name in ["pet", "species", "item", "trait", "wish", "task", "sign", "call", "town", "weather", "mark"]
    {
        at_least(name, 10);
    }
}

#[test]
fn tokenizer_round_trips_any_text() {
    let corpus = stories::corpus(1, 200_000);
    let tokenizer = stories::tokenizer(&corpus, 1024).unwrap();
    assert_eq!(tokenizer.get_vocab_size(true), 1024);
    assert_eq!(tokenizer.token_to_id(END), Some(0));
    for text in ["A kite.", " two  spaces\n\tand a tab", "naïve – 日本語 🪁 \u{0} don't", "", &corpus[..2000]]
    {
        let encoding = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(encoding.get_ids(), false).unwrap(), text);
    }
    let ends = tokenizer.encode(format!("One.{END}Two.{END}"), false).unwrap();
    assert_eq!(ends.get_ids().iter().filter(|&&id| id == 0).count(), 2);
    assert_eq!(ends.get_ids().last(), Some(&0));
    let again = stories::tokenizer(&corpus, 1024).unwrap();
    assert_eq!(tokenizer.to_string(false).unwrap(), again.to_string(false).unwrap());
}

#[test]
fn longer_contexts_predict_better() {
    let corpus = stories::corpus(1, 300_000);
    let tokenizer = stories::tokenizer(&corpus, 512).unwrap();
    let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    let (train, test) = (ids(&corpus), ids(&stories::corpus(2, 20_000)));
    let [unigram, bigram, trigram] = [1, 2, 3].map(|order| ngram::ngram_nll(&train, &test, 512, order));
    assert!(unigram < 512f64.ln() && bigram < unigram && trigram < bigram, "{unigram} {bigram} {trigram}");
    assert!((ngram::unigram_nll(&train, &test, 512) - unigram).abs() < 1e-12);
    assert!((ngram::bigram_nll(&train, &test, 512) - bigram).abs() < 1e-12);
    // Uniform text has the entropy of a die.
    let die: Vec<u32> = (0..6000).map(|index| index % 6).collect();
    assert!((ngram::unigram_nll(&die, &die, 6) - 6f64.ln()).abs() < 1e-6);
}
