//! What tying blocks costs, measured: the best donors, and the cheapest neighbours for a budget.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Tensor;

use super::donors::tie;
use super::starts::States;
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::{Architecture, Block, Decoder, StoredTypes};
use crate::plan::{Budget, Donor, Group, Groups, Matrices, Own, Plan, Ranks};
use crate::progress::{self, Observer};

/// Losses of a decoder whose blocks are tied step by step. The states at every depth of what was decided are kept,
/// so that a trial runs only from the first block that it changes.
struct Trials<'a> {
    /// Before any tying: donors and means are taken from here.
    cut: Decoder,
    /// What was decided so far.
    tied: Decoder,
    windows: &'a Windows,
    own_norms: bool,
    /// The input of every block on every window: `states[depth][window]`, and at last what the final norm sees.
    states: Vec<Vec<Tensor>>,
    loss: f64,
}

impl<'a> Trials<'a> {
    fn new(cut: Decoder, own_norms: bool, windows: &'a Windows) -> Result<Self> {
        let states = vec![States::new(&cut, windows)?.0];
        let mut trials = Self { tied: cut.clone(), cut, windows, own_norms, states, loss: 0.0 };
        trials.settle(trials.cut.clone(), 0)?;
        if !trials.loss.is_finite() {
            return Err(Error::NotFinite {
                what: "the loss before anything is tied".into(),
                value: trials.loss,
            });
        }
        Ok(trials)
    }

    /// Makes `decoder`, which differs from depth `from` on, what was decided.
    fn settle(&mut self, decoder: Decoder, from: usize) -> Result<()> {
        self.states.truncate(from + 1);
        let pass = decoder.pass(0, self.windows.seq_len())?;
        for depth in from..decoder.depth() {
            let Some(inputs) = self.states.last() else { break };
            let run = |x: &Tensor| decoder.run_block(depth, x, &pass);
            let outputs = inputs.iter().map(run).collect::<Result<Vec<_>>>()?;
            self.states.push(outputs);
        }
        self.loss = match self.states.last() {
            Some(last) => self.mean_loss(&decoder, last.iter().cloned().map(Ok))?,
            None => 0.0,
        };
        self.tied = decoder;
        Ok(())
    }

    /// The mean loss in nats per token from the final states of every window. What is tied badly may overflow.
    fn mean_loss(&self, decoder: &Decoder, states: impl Iterator<Item = Result<Tensor>>) -> Result<f64> {
        let (mut total, mut tokens) = (0.0, 0);
        for (window, state) in states.enumerate() {
            let targets = self.windows.window(window)?.get(1..).unwrap_or_default();
            total += decoder.window_nll(&state?, targets)?;
            tokens += targets.len();
        }
        Ok(total / tokens as f64)
    }

    /// What was decided, with these depths tied too.
    fn with_tie(&self, depths: &[usize], donor: Option<usize>) -> Result<Decoder> {
        let mut blocks: Vec<Block> = self.tied.blocks().to_vec();
        tie(&self.cut, &mut blocks, depths, donor, self.own_norms)?;
        Ok(self.tied.of_blocks(blocks))
    }

    /// Decides that these depths are tied; what [`cost`](Self::cost) says of it, bit for bit.
    fn tie(&mut self, depths: &[usize], donor: Option<usize>) -> Result<f64> {
        let before = self.loss;
        self.settle(self.with_tie(depths, donor)?, depths.first().copied().unwrap_or_default())?;
        Ok(if self.loss.is_finite() { self.loss - before } else { f64::INFINITY })
    }

    /// By how much the loss rises when these depths, ascending, are tied, with nothing that makes up for it; a loss that is
    /// not finite is an infinite one.
    fn cost(&self, depths: &[usize], donor: Option<usize>) -> Result<f64> {
        let decoder = self.with_tie(depths, donor)?;
        let from = depths.first().copied().unwrap_or_default();
        let pass = decoder.pass(0, self.windows.seq_len())?;
        let finals = self.states.get(from).into_iter().flatten().map(|x| {
            (from..decoder.depth()).try_fold(x.clone(), |x, depth| decoder.run_block(depth, &x, &pass))
        });
        let loss = self.mean_loss(&decoder, finals)?;
        Ok(if loss.is_finite() { loss - self.loss } else { f64::INFINITY })
    }

    /// What each of these donors would cost, the cheapest first; of equals the one that came first.
    fn donors(&self, depths: &[usize], donors: Vec<Option<usize>>) -> Result<Vec<(Option<usize>, f64)>> {
        let costs = donors.into_iter().map(|donor| Ok((donor, self.cost(depths, donor)?)));
        let mut costs = costs.collect::<Result<Vec<_>>>()?;
        costs.sort_by(|a, b| a.1.total_cmp(&b.1));
        Ok(costs)
    }

    /// Whether matrices that one of these depths had are still used by another depth: they go with the last tie only.
    fn lent(&self, depths: &[usize]) -> bool {
        let had = depths.iter().filter_map(|&depth| self.cut.blocks().get(depth));
        let others = || self.tied.blocks().iter().enumerate().filter(|(depth, _)| !depths.contains(depth));
        let mut used = had.flat_map(|had| others().map(move |(_, other)| (had, other)));
        used.any(|(had, other)| Arc::ptr_eq(&had.weights, &other.weights))
    }
}

/// The donors that `asked` allows, the mean as none.
fn candidates(depths: &[usize], asked: Donor) -> Vec<Option<usize>> {
    match asked {
        Donor::First => vec![depths.first().copied()],
        Donor::Mean => vec![None],
        Donor::Best => std::iter::once(None).chain(depths.iter().copied().map(Some)).collect(),
    }
}

/// These depths of those that stay, as blocks of the original model.
fn originals(kept: &[usize], depths: &[usize]) -> Result<Vec<usize>> {
    let block = |&depth: &usize| {
        kept.get(depth).copied().ok_or(Error::NoSuchBlock { index: depth, depth: kept.len() })
    };
    depths.iter().map(block).collect()
}

/// What a group of depths uses, as it is said of blocks of the original model; the mean has no donor.
fn matrices(kept: &[usize], donor: Option<usize>) -> Result<Matrices> {
    let Some(donor) = donor else { return Ok(Matrices::Mean) };
    let block = kept.get(donor).copied().ok_or(Error::NoSuchBlock { index: donor, depth: kept.len() })?;
    Ok(Matrices::Block(block))
}

/// A group of depths as a group of blocks of the original model; donors of infinite cost are none.
fn group(kept: &[usize], depths: &[usize], donors: &[(Option<usize>, f64)]) -> Result<Group> {
    let blocks = originals(kept, depths)?;
    let finite = donors.iter().filter(|(_, cost)| cost.is_finite());
    let tried =
        finite.map(|(donor, cost)| Ok((matrices(kept, *donor)?, *cost))).collect::<Result<Vec<_>>>()?;
    let Some(&(donor, cost)) = tried.first() else {
        let what = format!("the loss with blocks {blocks:?} tied, by whichever donor,");
        return Err(Error::NotFinite { what, value: f64::INFINITY });
    };
    Ok(Group { blocks, donor, cost: Some(cost), tried: if tried.len() > 1 { tried } else { Vec::new() } })
}

/// The groups of these blocks with what they cost, of the donors that were asked for the one that costs the least, first
/// to last: each is measured with those before it tied.
pub(crate) fn measured_groups(
    decoder: &Decoder,
    plan: &Plan,
    blocks: &[Vec<usize>],
    (donor, own_norms): (Donor, bool),
    windows: &Windows,
    observer: &mut dyn Observer,
) -> Result<Vec<Group>> {
    if blocks.is_empty() {
        return Ok(Vec::new());
    }
    let kept = plan.kept();
    let mut trials = Trials::new(decoder.without(&plan.units())?, own_norms, windows)?;
    let mut groups = Vec::with_capacity(blocks.len());
    progress::steps("groups", blocks.len(), observer, |place| {
        let Some(blocks) = blocks.get(place) else { return Ok(()) };
        let depths = blocks.iter().map(|&block| plan.depth_of(block)).collect::<Result<Vec<_>>>()?;
        let allowed = candidates(&depths, donor);
        // Where there is nothing to choose, what is decided is measured at once.
        if let [only] = *allowed {
            let cost = trials.tie(&depths, only)?;
            groups.push(group(&kept, &depths, &[(only, cost)])?);
            return Ok(());
        }
        let donors = trials.donors(&depths, allowed)?;
        groups.push(group(&kept, &depths, &donors)?);
        if let Some((donor, _)) = donors.first() {
            trials.tie(&depths, *donor)?;
        }
        Ok(())
    })?;
    Ok(groups)
}

/// How neighbours are tied until a budget is met.
pub(crate) struct Ties {
    pub budget: Budget,
    pub largest: Option<usize>,
    pub donor: Donor,
    pub own: Own,
}

/// Two neighbouring groups that might become one.
struct Candidate {
    depths: Vec<usize>,
    donors: Vec<(Option<usize>, f64)>,
    /// How many ties there were when it was measured.
    age: usize,
}

impl Candidate {
    fn cost(&self) -> f64 {
        self.donors.first().map_or(f64::INFINITY, |(_, cost)| *cost)
    }
}

/// What a search for ties works on.
struct Search<'a> {
    trials: Trials<'a>,
    kept: &'a [usize],
    /// The depths of every group, first to last; blocks that are not tied are groups of one.
    groups: Vec<(Vec<usize>, Option<Group>)>,
    /// What the model takes with these groups, less ranks that are for all of them together.
    size: &'a dyn Fn(&[Group]) -> Result<usize>,
}

impl Ties {
    /// The least that the model can take, by sizes alone: with all blocks tied that may be, where tying them makes it
    /// smaller at all. Of a model in which nothing is shared yet this is exact.
    pub(crate) fn least(&self, arch: &Architecture, plan: &Plan, types: &StoredTypes) -> Result<usize> {
        let size = |groups: &[Group], own| plan.size(arch, self.budget, (groups, own), types);
        let (start, parts) = (size(&[], self.own)?, plan.parts(arch)?);
        let whole = Groups::of(self.largest.unwrap_or(parts.len()).max(2));
        let group = |blocks: &[usize]| {
            let first = blocks.first().copied().filter(|_| self.donor != Donor::Mean);
            let donor = first.map_or(Matrices::Mean, Matrices::Block);
            Group { blocks: blocks.to_vec(), donor, cost: None, tried: Vec::new() }
        };
        let mut groups = Vec::new();
        for blocks in whole.decide(&parts).unwrap_or_default() {
            // A group begins with two, and where these make it no smaller there is none. What is shared already may
            // become less with the last tie only.
            let first = if arch.fold.is_plain() { blocks.get(..2).unwrap_or(&blocks) } else { &blocks };
            if size(&[group(first)], self.own_of_ties())? < start {
                groups.push(group(&blocks));
            }
        }
        Ok(size(&groups, self.own)?.min(start))
    }

    /// What every tied block takes for itself; ranks for a budget are for all of them together.
    fn own_of_ties(&self) -> Own {
        let residual = self.own.residual.filter(|residual| matches!(residual.ranks, Ranks::Uniform(_)));
        Own { residual, ..self.own }
    }

    /// Ties the neighbours that cost the least, measured with all earlier ties in place, and again until the budget
    /// is met; ties that make the model no smaller are passed over. A cost that was measured before the last tie is
    /// measured again only when it is the lowest: ties make others dearer much more often than cheaper.
    ///
    /// # Errors
    /// A budget that cannot be met, before anything is measured where nothing is shared yet; losses that are not finite,
    /// or a cancelling observer.
    pub(crate) fn choose(
        &self,
        decoder: &Decoder,
        plan: &Plan,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Vec<Group>> {
        const STAGE: &str = "ties";
        let (arch, kept) = (decoder.architecture(), plan.kept());
        let (types, limit) = (decoder.stored_types().of_blocks(&kept), self.budget.limit());
        let size = |groups: &[Group]| plan.size(arch, self.budget, (groups, self.own), &types);
        let size_of_ties =
            |groups: &[Group]| plan.size(arch, self.budget, (groups, self.own_of_ties()), &types);
        let unmet = |least: usize| {
            let (unit, reason) = (self.budget.unit(), "no other tie makes the model smaller");
            Error::Budget { what: "sharing", unit, budget: limit, least, reason }
        };
        let least = self.least(arch, plan, &types)?;
        if arch.fold.is_plain() && least > limit {
            return Err(unmet(least));
        }
        let trials = Trials::new(decoder.without(&plan.units())?, self.own.norms, windows)?;
        let groups = (0..kept.len()).map(|depth| (vec![depth], None)).collect();
        let mut search = Search { trials, kept: &kept, groups, size: &size_of_ties };
        let mut known: BTreeMap<Vec<usize>, Candidate> = BTreeMap::new();
        let start = size(&[])?;
        let (total, mut least) = (start.saturating_sub(limit) as u64, start);
        progress::stage(STAGE, total, observer, |observer| {
            for age in 0.. {
                let size = size(&search.with(None))?;
                least = least.min(size);
                let done = (start.saturating_sub(size) as u64).min(total);
                progress::advance(STAGE, done, total, observer)?;
                if size <= limit {
                    break;
                }
                let mut heard = || progress::advance(STAGE, done, total, observer);
                let best = self.cheapest(&search, &mut known, (age, &mut heard))?;
                search.tie(best.ok_or_else(|| unmet(least))?)?;
            }
            Ok(())
        })?;
        Ok(search.groups.into_iter().filter_map(|(_, group)| group).collect())
    }

    /// The pair of neighbouring groups that costs the least to tie, taken out of what is known.
    fn cheapest(
        &self,
        search: &Search<'_>,
        known: &mut BTreeMap<Vec<usize>, Candidate>,
        (age, heard): (usize, &mut dyn FnMut() -> Result<()>),
    ) -> Result<Option<Candidate>> {
        let (trials, groups) = (&search.trials, &search.groups);
        let pairs = groups.iter().zip(groups.iter().skip(1)).map(|(a, b)| [a.0.as_slice(), &b.0].concat());
        let pairs: Vec<Vec<usize>> = pairs
            .filter(|depths| {
                self.largest.is_none_or(|largest| depths.len() <= largest) && alike(trials, depths)
            })
            .collect();
        known.retain(|depths, _| pairs.contains(depths));
        let mut measured = |depths: Vec<usize>, known: &mut BTreeMap<Vec<usize>, Candidate>| -> Result<()> {
            let donors = search.shrinking(&depths, self.donor)?;
            if donors.is_empty() {
                return Ok(());
            }
            let donors = trials.donors(&depths, donors)?;
            known.insert(depths.clone(), Candidate { depths, donors, age });
            heard()
        };
        for depths in pairs {
            if !known.contains_key(&depths) {
                measured(depths, known)?;
            }
        }
        loop {
            let least = known.values().min_by(|a, b| a.cost().total_cmp(&b.cost()));
            let Some(depths) = least.map(|candidate| candidate.depths.clone()) else { return Ok(None) };
            let Some(candidate) = known.remove(&depths) else { return Ok(None) };
            if candidate.age == age {
                return Ok(Some(candidate));
            }
            measured(depths, known)?;
        }
    }
}

impl Search<'_> {
    /// The groups that there are, or one more in place of those that it holds.
    fn with(&self, more: Option<Group>) -> Vec<Group> {
        let held = |group: &Group| {
            more.iter().any(|more| group.blocks.iter().any(|block| more.blocks.contains(block)))
        };
        let chosen = self.groups.iter().filter_map(|(_, group)| group.as_ref());
        let mut groups: Vec<Group> = chosen.filter(|group| !held(group)).cloned().collect();
        groups.extend(more);
        groups
    }

    /// The donors by which tying these depths makes the model smaller, now or once others are tied too.
    fn shrinking(&self, depths: &[usize], asked: Donor) -> Result<Vec<Option<usize>>> {
        let (now, lent) = ((self.size)(&self.with(None))?, self.trials.lent(depths));
        let mut donors = Vec::new();
        for donor in candidates(depths, asked) {
            let (blocks, matrices) = (originals(self.kept, depths)?, matrices(self.kept, donor)?);
            let group = Group { blocks, donor: matrices, cost: None, tried: Vec::new() };
            if lent || (self.size)(&self.with(Some(group)))? < now {
                donors.push(donor);
            }
        }
        Ok(donors)
    }

    /// Decides a tie.
    fn tie(&mut self, best: Candidate) -> Result<()> {
        let mut made = group(self.kept, &best.depths, &best.donors)?;
        let donor = best.donors.first().and_then(|(donor, _)| *donor);
        self.trials.tie(&best.depths, donor)?;
        let inside = |depths: &[usize]| depths.iter().any(|depth| best.depths.contains(depth));
        let grown = self.groups.iter().filter(|(depths, _)| inside(depths));
        let before: f64 = grown.filter_map(|(_, group)| group.as_ref()?.cost).sum();
        made.cost = made.cost.map(|cost| cost + before);
        tracing::debug!(blocks = ?made.blocks, donor = ?made.donor, cost = made.cost, "tied");
        self.groups.retain(|(depths, _)| !inside(depths));
        self.groups.push((best.depths, Some(made)));
        self.groups.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(())
    }
}

/// Whether the depths have the same halves.
fn alike(trials: &Trials<'_>, depths: &[usize]) -> bool {
    let mut parts = depths.iter().filter_map(|&depth| trials.cut.blocks().get(depth)).map(Block::part);
    let first = parts.next();
    parts.all(|part| Some(part) == first)
}
