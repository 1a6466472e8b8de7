//! In which order windows are read.

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

/// All windows shuffled, then all of them shuffled anew, and so on: a function of seed and position alone, so that a
/// resumed run reads what an uninterrupted one does.
#[derive(Debug)]
pub(super) struct Order {
    seed: u64,
    count: usize,
    epoch: Option<usize>,
    shuffled: Vec<usize>,
}

impl Order {
    pub(super) fn new(seed: u64, count: usize) -> Self {
        Self { seed, count, epoch: None, shuffled: Vec::new() }
    }

    /// The windows at these positions of the endless sequence.
    pub(super) fn windows(&mut self, positions: std::ops::Range<usize>) -> Vec<usize> {
        positions.filter_map(|position| self.at(position)).collect()
    }

    fn at(&mut self, position: usize) -> Option<usize> {
        let epoch = position / self.count.max(1);
        if self.epoch != Some(epoch) {
            let seed = self.seed ^ (epoch as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.shuffled = (0..self.count).collect();
            self.shuffled.shuffle(&mut StdRng::seed_from_u64(seed));
            self.epoch = Some(epoch);
        }
        self.shuffled.get(position % self.count.max(1)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_reads_every_window_once_in_an_order_of_its_own() {
        let mut order = Order::new(3, 10);
        let epochs: Vec<Vec<usize>> =
            (0..3).map(|epoch| order.windows(epoch * 10..epoch * 10 + 10)).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
        assert_ne!(epochs[0], Order::new(4, 10).windows(0..10));
    }

    #[test]
    fn positions_may_be_asked_for_in_any_order() {
        let whole = Order::new(3, 7).windows(0..30);
        let mut order = Order::new(3, 7);
        assert_eq!(order.windows(12..30), whole[12..]);
        assert_eq!(order.windows(0..12), whole[..12]);
    }
}
