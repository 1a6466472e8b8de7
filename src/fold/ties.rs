//! What tying blocks costs, measured: the best donors, and the cheapest neighbours for a budget.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::donors::tie;
use super::starts::States;
use crate::data::Windows;
use crate::error::{Error, Result};
use crate::model::{Block, Decoder};
use crate::plan::{Budget, Donor, Group, Matrices, Own, Plan};
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

    /// What each donor that `asked` allows would cost, the cheapest first; of equals the mean, then the first block.
    fn donors(&self, depths: &[usize], asked: Donor) -> Result<Vec<(Option<usize>, f64)>> {
        let costs = candidates(depths, asked).into_iter().map(|donor| Ok((donor, self.cost(depths, donor)?)));
        let mut costs = costs.collect::<Result<Vec<_>>>()?;
        costs.sort_by(|a, b| a.1.total_cmp(&b.1));
        Ok(costs)
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

/// A group of depths as a group of blocks of the original model; donors of infinite cost are none.
fn group(kept: &[usize], depths: &[usize], donors: &[(Option<usize>, f64)]) -> Result<Group> {
    let block =
        |depth: usize| kept.get(depth).copied().ok_or(Error::NoSuchBlock { index: depth, depth: kept.len() });
    let matrices =
        |donor: Option<usize>| donor.map_or(Ok(Matrices::Mean), |depth| block(depth).map(Matrices::Block));
    let blocks = depths.iter().map(|&depth| block(depth)).collect::<Result<Vec<_>>>()?;
    let finite = donors.iter().filter(|(_, cost)| cost.is_finite());
    let tried = finite.map(|(donor, cost)| Ok((matrices(*donor)?, *cost))).collect::<Result<Vec<_>>>()?;
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
        // Where there is nothing to choose, what is decided is measured at once.
        if let [only] = *candidates(&depths, donor) {
            let cost = trials.tie(&depths, only)?;
            groups.push(group(&kept, &depths, &[(only, cost)])?);
            return Ok(());
        }
        let donors = trials.donors(&depths, donor)?;
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

impl Ties {
    /// Ties the neighbours that cost the least, measured with all earlier ties in place, and again until the budget
    /// is met. A cost that was measured before the last tie is measured again only when it is the lowest: ties make
    /// others dearer much more often than cheaper.
    pub(crate) fn choose(
        &self,
        decoder: &Decoder,
        plan: &Plan,
        windows: &Windows,
        observer: &mut dyn Observer,
    ) -> Result<Vec<Group>> {
        const STAGE: &str = "ties";
        let (arch, kept) = (decoder.architecture(), plan.kept());
        let mut trials = Trials::new(decoder.without(&plan.units())?, self.own.norms, windows)?;
        let mut groups: Vec<(Vec<usize>, Option<Group>)> =
            (0..kept.len()).map(|depth| (vec![depth], None)).collect();
        let mut known: BTreeMap<Vec<usize>, Candidate> = BTreeMap::new();
        let (types, limit) = (decoder.stored_types().of_blocks(&kept), self.budget.limit());
        let size = |groups: &[Group]| plan.size(arch, self.budget, (groups, self.own), &types);
        let start = size(&[])?;
        let total = start.saturating_sub(limit) as u64;
        progress::stage(STAGE, total, observer, |observer| {
            for age in 0.. {
                let chosen: Vec<Group> = groups.iter().filter_map(|(_, group)| group.clone()).collect();
                let size = size(&chosen)?;
                let done = (start.saturating_sub(size) as u64).min(total);
                progress::advance(STAGE, done, total, observer)?;
                if size <= limit {
                    break;
                }
                let mut heard = || progress::advance(STAGE, done, total, observer);
                let best = self.cheapest(&trials, &groups, &mut known, (age, &mut heard))?;
                let Some(best) = best else {
                    let (unit, reason) = (self.budget.unit(), "all neighbours that may be are tied");
                    return Err(Error::Budget { what: "sharing", unit, budget: limit, least: size, reason });
                };
                let mut made = group(&kept, &best.depths, &best.donors)?;
                let Some((donor, _)) = best.donors.first() else { break };
                trials.tie(&best.depths, *donor)?;
                let inside = |depths: &[usize]| depths.iter().any(|depth| best.depths.contains(depth));
                let grown = groups.iter().filter(|(depths, _)| inside(depths));
                let before: f64 = grown.filter_map(|(_, group)| group.as_ref()?.cost).sum();
                made.cost = made.cost.map(|cost| cost + before);
                tracing::debug!(blocks = ?made.blocks, donor = ?made.donor, cost = made.cost, "tied");
                groups.retain(|(depths, _)| !inside(depths));
                groups.push((best.depths, Some(made)));
                groups.sort_by(|a, b| a.0.cmp(&b.0));
            }
            Ok(())
        })?;
        Ok(groups.into_iter().filter_map(|(_, group)| group).collect())
    }

    /// The pair of neighbouring groups that costs the least to tie, taken out of what is known.
    fn cheapest(
        &self,
        trials: &Trials<'_>,
        groups: &[(Vec<usize>, Option<Group>)],
        known: &mut BTreeMap<Vec<usize>, Candidate>,
        (age, heard): (usize, &mut dyn FnMut() -> Result<()>),
    ) -> Result<Option<Candidate>> {
        let pairs = groups.iter().zip(groups.iter().skip(1)).map(|(a, b)| [a.0.as_slice(), &b.0].concat());
        let pairs: Vec<Vec<usize>> = pairs
            .filter(|depths| {
                self.largest.is_none_or(|largest| depths.len() <= largest) && alike(trials, depths)
            })
            .collect();
        known.retain(|depths, _| pairs.contains(depths));
        for depths in pairs {
            if !known.contains_key(&depths) {
                let donors = trials.donors(&depths, self.donor)?;
                known.insert(depths.clone(), Candidate { depths, donors, age });
                heard()?;
            }
        }
        loop {
            let least = known.values().min_by(|a, b| a.cost().total_cmp(&b.cost()));
            let Some(depths) = least.map(|candidate| candidate.depths.clone()) else { return Ok(None) };
            let Some(candidate) = known.remove(&depths) else { return Ok(None) };
            if candidate.age == age {
                return Ok(Some(candidate));
            }
            let donors = trials.donors(&depths, self.donor)?;
            known.insert(depths.clone(), Candidate { depths, donors, age });
            heard()?;
        }
    }
}

/// Whether the depths have the same halves.
fn alike(trials: &Trials<'_>, depths: &[usize]) -> bool {
    let mut parts = depths.iter().filter_map(|&depth| trials.cut.blocks().get(depth)).map(Block::part);
    let first = parts.next();
    parts.all(|part| Some(part) == first)
}
