//! What losses on some windows say of losses on more.

use super::removals::Removed;

/// The mean losses without any removal and with every single one, on some windows.
///
/// Windows differ in how much they need each unit, and far more in that than in how units act together: what each
/// unit costs alone carries over most of the difference between a few windows and all of them.
#[derive(Debug, Clone, Default)]
pub(super) struct Basis {
    pub windows: usize,
    pub dense: f64,
    pub singles: Vec<f64>,
}

impl Basis {
    /// From the losses of no removal and of every single one, in this order.
    pub(super) fn new(windows: usize, losses: &[f64]) -> Self {
        let (dense, singles) = losses.split_first().map_or((0.0, &[][..]), |(dense, rest)| (*dense, rest));
        Self { windows, dense, singles: singles.to_vec() }
    }

    /// The basis of the windows of several.
    pub(super) fn of_all<'b>(bases: impl IntoIterator<Item = &'b Self>) -> Self {
        bases.into_iter().fold(Self::default(), |sum, basis| {
            let windows = sum.windows + basis.windows;
            let share = basis.windows as f64 / windows as f64;
            let mean = |old: f64, new: f64| old + share * (new - old);
            let olds = sum.singles.iter().copied().chain(std::iter::repeat(0.0));
            let singles = basis.singles.iter().zip(olds).map(|(&new, old)| mean(old, new)).collect();
            Self { windows, dense: mean(sum.dense, basis.dense), singles }
        })
    }

    /// What each unit costs alone, in nats per token.
    pub(super) fn increases(&self) -> impl Iterator<Item = f64> {
        self.singles.iter().map(|single| single - self.dense)
    }

    /// How much higher a set's loss is expected to be on the windows of `all` than on these.
    pub(super) fn shift(&self, all: &Self, set: &Removed) -> f64 {
        let units = self.increases().zip(all.increases()).zip(set).filter(|(_, removed)| **removed);
        all.dense - self.dense + units.map(|((here, there), _)| there - here).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_units_act_alone_the_shift_is_exact() {
        let few = Basis::new(1, &[3.0, 3.1, 3.4, 3.2]);
        let rest = Basis::new(3, &[2.0, 2.5, 2.2, 2.2]);
        let all = Basis::of_all([&few, &rest]);
        let loss = |basis: &Basis, set: &Removed| {
            let units = basis.increases().zip(set).filter(|(_, removed)| **removed);
            basis.dense + units.map(|(increase, _)| increase).sum::<f64>()
        };
        for set in [vec![false; 3], vec![true, false, true], vec![true; 3]] {
            let whole = (loss(&few, &set) + 3.0 * loss(&rest, &set)) / 4.0;
            assert!((loss(&few, &set) + few.shift(&all, &set) - whole).abs() < 1e-12, "{set:?}");
        }
    }
}
