//! What sets of removals are expected to cost, from those that were measured.

/// Bayesian linear regression of losses on the presence of single units, pairs and triples, in its kernel form.
///
/// Two sets that share `n` units covary by `v₁·n + v₂·C(n, 2) + v₃·C(n, 3)`: their losses have that many main
/// effects, pair effects and triple effects in common. Where all singles and pairs were measured the prediction is
/// their sum; sets measured elsewhere correct it around themselves.
pub(super) struct Surrogate {
    sets: Vec<Bits>,
    weights: Vec<f64>,
    origin: f64,
    /// The lower Cholesky factor of the sets' covariance, row by row.
    factor: Vec<Vec<f64>>,
    /// Standard deviation of a single effect, as the losses suggest.
    scale: f64,
}

/// Prior variances of single, pair and triple effects. Only their ratios matter: an effect of one more unit is
/// expected to be about a third as large.
const VARIANCES: [f64; 3] = [1.0, 0.1, 0.01];
/// Keeps the system solvable where measured sets are linearly dependent.
const NOISE: f64 = 1e-6;

impl Surrogate {
    /// Fits to measured losses; `dense_loss` is that of the empty set.
    pub(super) fn fit(measured: &[(Vec<bool>, f64)], dense_loss: f64) -> Self {
        let sets: Vec<Bits> = measured.iter().map(|(set, _)| Bits::of(set)).collect();
        let costs: Vec<f64> = measured.iter().map(|(_, loss)| loss - dense_loss).collect();
        let mut rows: Vec<Vec<f64>> = Vec::with_capacity(sets.len());
        for (place, set) in sets.iter().enumerate() {
            let mut row: Vec<f64> = sets.iter().take(place + 1).map(|other| covariance(set, other)).collect();
            if let Some(diagonal) = row.last_mut() {
                *diagonal += NOISE * (1.0 + *diagonal);
            }
            rows.push(row);
        }
        factorise(&mut rows);
        let half = forward(&rows, costs);
        // The most likely scale of effects that would give these losses.
        let scale = (half.iter().map(|x| x * x).sum::<f64>() / half.len().max(1) as f64).sqrt();
        let weights = backward(&rows, half);
        Self { sets, weights, origin: dense_loss, factor: rows, scale }
    }

    /// The standard deviation of [`predict`](Self::predict).
    pub(super) fn deviation(&self, set: &[bool]) -> f64 {
        let set = &Bits::of(set);
        let shared = self.sets.iter().map(|known| covariance(set, known)).collect();
        let explained: f64 = forward(&self.factor, shared).iter().map(|x| x * x).sum();
        self.scale * (covariance(set, set) - explained).max(0.0).sqrt()
    }

    /// The expected loss without the units of `set`.
    pub(super) fn predict(&self, set: &[bool]) -> f64 {
        let set = &Bits::of(set);
        let terms =
            self.sets.iter().zip(&self.weights).map(|(known, weight)| covariance(set, known) * weight);
        self.origin + terms.sum::<f64>()
    }
}

/// A set by membership, 64 places in a word.
struct Bits(Vec<u64>);

impl Bits {
    fn of(set: &[bool]) -> Self {
        let word = |places: &[bool]| places.iter().rev().fold(0, |word, &place| word << 1 | u64::from(place));
        Self(set.chunks(64).map(word).collect())
    }
}

fn covariance(a: &Bits, b: &Bits) -> f64 {
    let n = f64::from(a.0.iter().zip(&b.0).map(|(a, b)| (a & b).count_ones()).sum::<u32>());
    let [single, pair, triple] = VARIANCES;
    single * n + pair * n * (n - 1.0) / 2.0 + triple * n * (n - 1.0) * (n - 2.0) / 6.0
}

/// Replaces the lower triangle of a symmetric positive definite matrix by its Cholesky factor.
fn factorise(lower: &mut [Vec<f64>]) {
    for i in 0..lower.len() {
        let (above, rest) = lower.split_at_mut(i);
        let Some(row) = rest.first_mut() else { break };
        for j in 0..=i {
            let (left, right) = row.split_at_mut(j);
            let Some(value) = right.first_mut() else { break };
            match above.get(j) {
                Some(other) => {
                    *value -= left.iter().zip(other).map(|(a, b)| a * b).sum::<f64>();
                    *value /= other.get(j).copied().unwrap_or(1.0);
                }
                None => *value = (*value - left.iter().map(|a| a * a).sum::<f64>()).max(NOISE * NOISE).sqrt(),
            }
        }
    }
}

/// Solves `L x = b`.
fn forward(lower: &[Vec<f64>], mut x: Vec<f64>) -> Vec<f64> {
    for (i, row) in lower.iter().enumerate() {
        let known: f64 = row.iter().zip(x.iter().take(i)).map(|(a, x)| a * x).sum();
        if let (Some(value), Some(diagonal)) = (x.get_mut(i), row.get(i)) {
            *value = (*value - known) / diagonal;
        }
    }
    x
}

/// Solves `Lᵀ x = b`.
fn backward(lower: &[Vec<f64>], mut x: Vec<f64>) -> Vec<f64> {
    for (i, row) in lower.iter().enumerate().rev() {
        let (before, rest) = x.split_at_mut(i);
        if let (Some(value), Some(diagonal)) = (rest.first_mut(), row.get(i)) {
            *value /= diagonal;
            before.iter_mut().zip(row).for_each(|(x, a)| *x -= a * *value);
        }
    }
    x
}

#[cfg(test)]
#[allow(clippy::cast_lossless)]
mod tests {
    use super::*;

    fn set(places: &[usize]) -> Vec<bool> {
        (0..8).map(|place| places.contains(&place)).collect()
    }

    /// A loss with known main effects, pairs, and one triple.
    fn loss(set: &[bool]) -> f64 {
        let on = |i: usize| f64::from(u8::from(set[i]));
        let main: f64 = (0..8).map(|i| on(i) * (0.1 + 0.05 * i as f64)).sum();
        3.0 + main + 0.4 * on(1) * on(2) - 0.2 * on(3) * on(5) + 0.3 * on(0) * on(4) * on(6)
    }

    #[test]
    fn singles_and_pairs_are_reproduced_and_added_up() {
        let mut measured = vec![(set(&[]), loss(&set(&[])))];
        for i in 0..8 {
            measured.push((set(&[i]), loss(&set(&[i]))));
            measured.extend((0..i).map(|j| (set(&[i, j]), loss(&set(&[i, j])))));
        }
        let surrogate = Surrogate::fit(&measured, 3.0);
        for (set, loss) in &measured {
            assert!((surrogate.predict(set) - loss).abs() < 1e-4);
        }
        // Without the triple, singles and pairs are all there is.
        let three = set(&[1, 2, 3]);
        assert!((surrogate.predict(&three) - loss(&three)).abs() < 0.02);
        // A measured triple corrects the sets that contain it.
        let with_triple = set(&[0, 4, 6, 7]);
        let before = (surrogate.predict(&with_triple) - loss(&with_triple)).abs();
        measured.push((set(&[0, 4, 6]), loss(&set(&[0, 4, 6]))));
        let after = (Surrogate::fit(&measured, 3.0).predict(&with_triple) - loss(&with_triple)).abs();
        assert!(after < before / 3.0, "{before} before, {after} after");
    }

    #[test]
    fn measured_sets_are_certain_and_unlike_ones_are_not() {
        let measured: Vec<_> = (0..8).map(|i| (set(&[i]), loss(&set(&[i])))).collect();
        let surrogate = Surrogate::fit(&measured, 3.0);
        assert!(surrogate.deviation(&set(&[3])) < 1e-2 * surrogate.deviation(&set(&[3, 4])));
        // Pairs of measured singles: what is unknown is the pair's own effect.
        let pair = surrogate.deviation(&set(&[3, 4]));
        assert!((pair / surrogate.scale - VARIANCES[1].sqrt()).abs() < 1e-3, "{pair}");
        assert!(surrogate.deviation(&set(&[1, 2, 3, 4])) > pair);
    }
}
