//! What tests of products have in common.

/// Numbers between −1 and 1, the same for the same seed.
pub(super) fn numbers(count: usize, seed: u64) -> Vec<f32> {
    use rand::{Rng, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

/// Whether `found` is the sum of `terms`, as far as sums in f32 are.
pub(super) fn is_sum(found: f32, terms: impl Iterator<Item = f64> + Clone) -> bool {
    let magnitude: f64 = terms.clone().map(f64::abs).sum();
    (f64::from(found) - terms.sum::<f64>()).abs() <= 1e-6 * magnitude
}
