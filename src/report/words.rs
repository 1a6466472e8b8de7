//! What a recipe asks for, in words.

use super::number::{fixed, list};
use crate::heal::{Budget, Heal, Trainable};
use crate::pipeline::{Goal, MixOptions, Recipe, Share, Total};
use crate::plan::{self, Donor, Groups};

/// How much is removed.
pub(super) fn target(recipe: &Recipe) -> String {
    match recipe.target {
        None => "nothing is removed for itself".into(),
        Some(Goal::Rate(rate)) => format!("{} % of the blocks removed", percent(rate)),
        Some(Goal::Blocks(count)) => format!("{count} blocks removed"),
        Some(Goal::Parameters(most)) => format!("at most {} parameters left", fixed(most as f64, 0)),
        Some(Goal::Bytes(most)) => format!("at most {} bytes of tensors left", fixed(most as f64, 0)),
        Some(Goal::NllIncrease(limit)) => {
            format!("as many blocks removed as cost at most {limit} nats per token before any healing")
        }
    }
}

/// What is shared.
pub(super) fn share(share: &Share) -> String {
    let groups = match &share.groups {
        Groups::Consecutive { size, within: None } => format!("groups of {size} consecutive blocks"),
        Groups::Consecutive { size, within: Some((first, last)) } => {
            format!("groups of {size} consecutive blocks, from {first} to {last}")
        }
        Groups::Explicit(groups) => {
            let groups: Vec<String> = groups.iter().map(|group| list(group)).collect();
            format!("blocks {}", groups.join(" and "))
        }
        Groups::Budget { budget, .. } => {
            let budget = match budget {
                plan::Budget::Parameters(most) => format!("{} parameters", fixed(*most as f64, 0)),
                plan::Budget::Bytes(most) => format!("{} bytes", fixed(*most as f64, 0)),
            };
            format!("the cheapest neighbours, until the model takes {budget}")
        }
    };
    format!("{groups}; {}; {}", donor(share.donor), share.own)
}

/// A total that removal, sharing and rank meet together.
pub(super) fn mix(mix: &MixOptions) -> String {
    let total = match mix.total {
        Total::Share(share) => format!("{} % of the parameters", percent(share)),
        Total::Parameters(most) => format!("{} parameters", fixed(most as f64, 0)),
    };
    let how = if mix.search { "the best of several mixes" } else { "removal first, then sharing, then rank" };
    let shares: Vec<String> = mix.residual_shares().into_iter().map(percent).collect();
    format!("at most {total}: {how}; {}; {} % for residuals", donor(mix.donor), shares.join(" or "))
}

fn donor(donor: Donor) -> &'static str {
    match donor {
        Donor::First => "matrices of the first block",
        Donor::Mean => "means of the matrices",
        Donor::Best => "the best of means and blocks",
    }
}

/// How it is healed.
pub(super) fn heal(heal: &Heal) -> String {
    let budget = match heal.budget {
        Budget::Steps(steps) => format!("{steps} steps"),
        Budget::Tokens(tokens) => format!("{} tokens", fixed(tokens as f64, 0)),
        Budget::Minutes(minutes) => format!("{minutes} minutes"),
    };
    let trained: Vec<&str> = heal.groups.iter().map(|group| trained(&group.params)).collect();
    let losses = [
        ("the text", heal.losses.cross_entropy),
        ("the original's logits", heal.losses.divergence),
        ("the original's last hidden states", heal.losses.tail),
    ];
    let losses: Vec<&str> =
        losses.into_iter().filter(|(_, weight)| *weight > 0.0).map(|(name, _)| name).collect();
    format!("{budget} of {} windows; trains {}; by {}", heal.batch, trained.join(", "), losses.join(", "))
}

fn trained(params: &Trainable) -> &'static str {
    match params {
        Trainable::Norms => "norms",
        Trainable::Scales => "scales",
        Trainable::Lora(_) => "low-rank adapters",
        Trainable::Residuals => "residuals",
        Trainable::SharedMatrices => "shared matrices",
        Trainable::LastBlocks(_) => "the last blocks",
        Trainable::Head => "the head",
        Trainable::Matrices => "all matrices",
        Trainable::Everything => "everything",
    }
}

fn percent(share: f64) -> String {
    let text = format!("{:.2}", 100.0 * share);
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// What a method's scores are measured in.
pub(super) fn importance(method: &str) -> &'static str {
    match method {
        "coupling" | "gates" => "probability that the gate is open",
        "block-influence" => "1 - cos(input, output)",
        "macro-influence" => "1 - cos of the last block's output",
        "angular" => "angular distance in units of π",
        "perplexity" | "greedy-perplexity" => "loss without the block, nats per token",
        "taylor" => "Σ |W ⊙ ∂L/∂W|, nats per token",
        "random" => "a number drawn at random",
        _ => "importance, in the method's own unit",
    }
}
