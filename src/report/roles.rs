//! What became of every block.

use super::number::list;
use crate::model::Part;
use crate::plan::{Group, Matrices, Plan};

/// What became of a block.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Role {
    /// It runs with its own matrices.
    Stays,
    /// It lost this half.
    Lost(Part),
    /// It is gone.
    Removed,
    /// It runs with the matrices of a group, by its place among the groups.
    Shares(usize),
}

/// What became of a unit, a block or a half of one.
pub(super) fn role_of(plan: &Plan, block: usize, part: Part) -> Role {
    match role(plan, block) {
        Role::Lost(lost) if lost == part => Role::Removed,
        Role::Lost(_) if part != Part::Whole => Role::Stays,
        role => role,
    }
}

fn role(plan: &Plan, block: usize) -> Role {
    if plan.removed().contains(&block) {
        return Role::Removed;
    }
    if let Some(group) = groups(plan).iter().position(|group| group.blocks.contains(&block)) {
        return Role::Shares(group);
    }
    let half = plan.removed_halves().iter().find(|unit| unit.block == block);
    half.map_or(Role::Stays, |unit| Role::Lost(unit.part))
}

/// Which blocks are gone, as a fact.
pub(super) fn removed_blocks(blocks: &[usize]) -> (&'static str, String) {
    ("blocks that were removed", list(blocks))
}

/// What is gone, as facts.
pub(super) fn removed(plan: &Plan) -> Vec<(&'static str, String)> {
    let mut facts = vec![removed_blocks(plan.removed())];
    if !plan.removed_halves().is_empty() {
        let halves: Vec<String> = plan.removed_halves().iter().map(ToString::to_string).collect();
        facts.push(("halves that were removed", halves.join(", ")));
    }
    facts
}

/// The groups of blocks that share.
pub(super) fn groups(plan: &Plan) -> &[Group] {
    plan.sharing().map(|sharing| sharing.groups.as_slice()).unwrap_or_default()
}

/// A group's name: A to Z, then AA.
pub(super) fn letter(group: usize) -> String {
    let letter = char::from(b'A' + (group % 26) as u8);
    letter.to_string().repeat(group / 26 + 1)
}

/// What became of a block, in words.
pub(super) fn words(role: &Role) -> String {
    match role {
        Role::Stays => "stays".into(),
        Role::Lost(Part::Attention) => "lost its attention".into(),
        Role::Lost(_) => "lost its MLP".into(),
        Role::Removed => "removed".into(),
        Role::Shares(group) => format!("shares, group {}", letter(*group)),
    }
}

/// Whose matrices a block runs with.
pub(super) fn matrices(plan: &Plan, block: usize) -> String {
    match role(plan, block) {
        Role::Removed => String::new(),
        Role::Stays | Role::Lost(_) => "its own".into(),
        Role::Shares(group) => match groups(plan).get(group).map(|group| (group.donor, &group.blocks)) {
            Some((Matrices::Block(donor), _)) => format!("those of block {donor}"),
            Some((Matrices::Mean, blocks)) => format!("the mean of blocks {}", list(blocks)),
            None => String::new(),
        },
    }
}
