//! Choosing the set to remove, from scores and coupling.

use super::coupling::Coupling;
use crate::error::Result;

/// A set of places, by membership.
pub(super) type Set = Vec<bool>;

/// How many sets an exact search may look at before the local search takes over.
const EXACT_LIMIT: u64 = 2_000_000;

impl Coupling {
    /// The `count` places outside of `kept` that are cheapest to remove together by singles and pairs: exact where
    /// the sets are few enough to be enumerated with bounds, otherwise greedy and improved by swaps until none helps.
    ///
    /// # Errors
    /// More places to remove than are free, or a place to keep that there is not.
    pub fn select(&self, count: usize, kept: &[usize]) -> Result<Vec<usize>> {
        super::check_blocks(kept, self.matrix.len())?;
        let free: Vec<usize> = (0..self.matrix.len()).filter(|place| !kept.contains(place)).collect();
        super::check_removal(count, free.len())?;
        let start = greedy(self, &free, count);
        if binomial(free.len() as u64, count as u64) > EXACT_LIMIT {
            let costs = |set: &Set| self.cost(&places(set));
            return Ok(places(&swap_search(membership(self.matrix.len(), &start), &free, &costs)));
        }
        let mut search =
            Exact { coupling: self, free: &free, count, best_cost: self.cost(&start), best: start };
        search.descend(&mut Vec::new(), 0, 0.0);
        search.best.sort_unstable();
        Ok(search.best)
    }
}

fn greedy(coupling: &Coupling, free: &[usize], count: usize) -> Vec<usize> {
    let mut chosen: Vec<usize> = Vec::new();
    while chosen.len() < count {
        let cost = |&place: &usize| coupling.cost(&[chosen.as_slice(), &[place]].concat());
        let open = free.iter().copied().filter(|place| !chosen.contains(place));
        let Some(next) = open.min_by(|a, b| cost(a).total_cmp(&cost(b))) else { break };
        chosen.push(next);
    }
    chosen.sort_unstable();
    chosen
}

/// Swaps one place in for one out for as long as that lowers `cost`, always by the best swap.
pub(super) fn swap_search(mut set: Set, free: &[usize], cost: &dyn Fn(&Set) -> f64) -> Set {
    let mut current = cost(&set);
    loop {
        let best = swaps(&set, free).into_iter().map(|swapped| (cost(&swapped), swapped));
        match best.min_by(|a, b| a.0.total_cmp(&b.0)).filter(|(lower, _)| *lower < current - 1e-12) {
            Some((lower, swapped)) => (current, set) = (lower, swapped),
            None => return set,
        }
    }
}

/// Every set that differs from `set` by one place in and one out.
pub(super) fn swaps(set: &Set, free: &[usize]) -> Vec<Set> {
    let has = |place: usize| set.get(place).copied().unwrap_or_default();
    let swapped = |out: usize, inside: usize| {
        (0..set.len()).map(|place| (has(place) && place != out) || place == inside).collect::<Set>()
    };
    let outs = free.iter().copied().filter(|&place| has(place));
    outs.flat_map(|out| free.iter().filter(|&&place| !has(place)).map(move |&inside| (out, inside)))
        .map(|(out, inside)| swapped(out, inside))
        .collect()
}

/// Branch and bound over sets in ascending order of their places.
struct Exact<'a> {
    coupling: &'a Coupling,
    free: &'a [usize],
    count: usize,
    best: Vec<usize>,
    best_cost: f64,
}

impl Exact<'_> {
    fn descend(&mut self, chosen: &mut Vec<usize>, from: usize, cost: f64) {
        if chosen.len() == self.count {
            if cost < self.best_cost {
                (self.best_cost, self.best) = (cost, chosen.clone());
            }
            return;
        }
        if cost + self.bound(chosen, from) >= self.best_cost {
            return;
        }
        for index in from..self.free.len() {
            let Some(&place) = self.free.get(index) else { break };
            let added = self.added(chosen, place);
            chosen.push(place);
            self.descend(chosen, index + 1, cost + added);
            chosen.pop();
        }
    }

    fn added(&self, chosen: &[usize], place: usize) -> f64 {
        self.coupling.get(place, place)
            + chosen.iter().map(|&other| self.coupling.get(place, other)).sum::<f64>()
    }

    /// The least that the places still missing can add: the cheapest of them, each with its most helpful pairs.
    fn bound(&self, chosen: &[usize], from: usize) -> f64 {
        let missing = self.count - chosen.len();
        let open = self.free.get(from..).unwrap_or_default();
        let mut least: Vec<f64> = open
            .iter()
            .map(|&place| {
                let others = open.iter().filter(|&&other| other != place);
                let mut helpful: Vec<f64> = others.map(|&other| self.coupling.get(place, other)).collect();
                helpful.sort_by(f64::total_cmp);
                // Each pair counts for both of its places, so half of it for one.
                self.added(chosen, place) + helpful.iter().take(missing - 1).sum::<f64>() / 2.0
            })
            .collect();
        least.sort_by(f64::total_cmp);
        least.iter().take(missing).sum()
    }
}

pub(super) fn membership(n: usize, places: &[usize]) -> Set {
    (0..n).map(|place| places.contains(&place)).collect()
}

pub(super) fn places(set: &Set) -> Vec<usize> {
    set.iter().enumerate().filter(|(_, removed)| **removed).map(|(place, _)| place).collect()
}

/// `n` over `k`, saturating.
fn binomial(n: u64, k: u64) -> u64 {
    let k = k.min(n.saturating_sub(k));
    (0..k).fold(1u64, |product, i| product.saturating_mul(n - i) / (i + 1))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::needless_range_loop, clippy::cast_lossless)]
mod tests {
    use super::*;

    fn coupling(n: usize, seed: u64) -> Coupling {
        let mut state = seed;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1u32 << 31) - 0.5
        };
        let mut matrix = vec![vec![0.0; n]; n];
        for i in 0..n {
            for j in 0..=i {
                let value = if i == j { 0.5 + draw().abs() } else { draw() };
                (matrix[i][j], matrix[j][i]) = (value, value);
            }
        }
        Coupling { matrix, dense_loss: 3.0, block_runs: 0.0 }
    }

    fn brute_force(coupling: &Coupling, count: usize, kept: &[usize]) -> f64 {
        let n = coupling.matrix.len();
        (0u32..1 << n)
            .filter(|set| {
                set.count_ones() as usize == count && kept.iter().all(|place| set >> place & 1 == 0)
            })
            .map(|set| coupling.cost(&(0..n).filter(|place| set >> place & 1 == 1).collect::<Vec<_>>()))
            .fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn the_exact_search_finds_what_enumeration_finds() {
        for seed in 1..20 {
            let coupling = coupling(10, seed);
            for (count, kept) in [(1, &[][..]), (3, &[0, 9]), (5, &[4]), (7, &[0])] {
                let found = coupling.select(count, kept).unwrap();
                assert!(found.len() == count && kept.iter().all(|place| !found.contains(place)));
                let expected = brute_force(&coupling, count, kept);
                assert!(
                    (coupling.cost(&found) - expected).abs() < 1e-9,
                    "seed {seed}, {count} without {kept:?}"
                );
            }
        }
        assert!(coupling(5, 1).select(4, &[0, 1]).is_err());
    }

    #[test]
    fn swaps_end_where_no_swap_helps() {
        let coupling = coupling(12, 3);
        let free: Vec<usize> = (0..12).collect();
        let cost = |set: &Set| coupling.cost(&places(set));
        let found = swap_search(membership(12, &[0, 1, 2, 3]), &free, &cost);
        assert!(swaps(&found, &free).iter().all(|swapped| cost(swapped) >= cost(&found) - 1e-12));
        assert_eq!(swaps(&found, &free).len(), 4 * 8);
    }
}
