//! What sets of removals are expected to cost, from those that were measured.

/// Bayesian linear regression of losses on the presence of single units, pairs and triples, in its kernel form.
///
/// Two sets that share `n` units covary by `v₁·n + v₂·C(n, 2) + v₃·C(n, 3)`: their losses have that many main
/// effects, pair effects and triple effects in common. Where all singles and pairs were measured the prediction is
/// their sum; sets measured elsewhere correct it around themselves.
pub(super) struct Surrogate {
    sets: Vec<Vec<bool>>,
    weights: Vec<f64>,
    origin: f64,
}

/// Prior variances of single, pair and triple effects. Only their ratios matter: an effect of one more unit is
/// expected to be about a third as large.
const VARIANCES: [f64; 3] = [1.0, 0.1, 0.01];
/// Keeps the system solvable where measured sets are linearly dependent.
const NOISE: f64 = 1e-6;

impl Surrogate {
    /// Fits to measured losses; `dense_loss` is that of the empty set.
    pub(super) fn fit(measured: &[(Vec<bool>, f64)], dense_loss: f64) -> Self {
        let sets: Vec<Vec<bool>> = measured.iter().map(|(set, _)| set.clone()).collect();
        let costs: Vec<f64> = measured.iter().map(|(_, loss)| loss - dense_loss).collect();
        let mut rows: Vec<Vec<f64>> = Vec::with_capacity(sets.len());
        for (place, set) in sets.iter().enumerate() {
            let mut row: Vec<f64> = sets.iter().take(place + 1).map(|other| covariance(set, other)).collect();
            if let Some(diagonal) = row.last_mut() {
                *diagonal += NOISE * (1.0 + *diagonal);
            }
            rows.push(row);
        }
        let weights = solve(rows, costs);
        Self { sets, weights, origin: dense_loss }
    }

    /// The expected loss without the units of `set`.
    pub(super) fn predict(&self, set: &[bool]) -> f64 {
        let terms =
            self.sets.iter().zip(&self.weights).map(|(known, weight)| covariance(set, known) * weight);
        self.origin + terms.sum::<f64>()
    }
}

fn covariance(a: &[bool], b: &[bool]) -> f64 {
    let n = a.iter().zip(b).filter(|(a, b)| **a && **b).count() as f64;
    let [single, pair, triple] = VARIANCES;
    single * n + pair * n * (n - 1.0) / 2.0 + triple * n * (n - 1.0) * (n - 2.0) / 6.0
}

/// Solves `A x = b` for a symmetric positive definite `A`, given as its lower triangle, by Cholesky.
fn solve(mut lower: Vec<Vec<f64>>, mut x: Vec<f64>) -> Vec<f64> {
    let n = x.len();
    for i in 0..n {
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
    let at = |i: usize, j: usize| lower.get(i).and_then(|row| row.get(j)).copied().unwrap_or_default();
    for i in 0..n {
        let known: f64 = (0..i).map(|j| at(i, j) * x.get(j).copied().unwrap_or_default()).sum();
        if let Some(value) = x.get_mut(i) {
            *value = (*value - known) / at(i, i);
        }
    }
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|j| at(j, i) * x.get(j).copied().unwrap_or_default()).sum();
        if let Some(value) = x.get_mut(i) {
            *value = (*value - known) / at(i, i);
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
}
