//! Means and rank correlations.

/// The mean of rows of equal length, column by column.
pub(super) fn means(rows: &[Vec<f64>]) -> Vec<f64> {
    let columns = rows.first().map_or(0, Vec::len);
    let column = |index| rows.iter().filter_map(|row| row.get(index)).sum::<f64>() / rows.len() as f64;
    (0..columns).map(column).collect()
}

/// Spearman's rank correlation of two lists of equal length: 1 for the same order, −1 for the opposite one. Equal
/// values share the mean of their ranks; 0 where one of the lists has no order at all.
#[must_use]
pub fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (ranks(a), ranks(b));
    let centre = f64::midpoint(a.len() as f64, 1.0);
    let sum = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - centre) * (y - centre)).sum::<f64>();
    let scale = (sum(&a, &a) * sum(&b, &b)).sqrt();
    if scale == 0.0 { 0.0 } else { sum(&a, &b) / scale }
}

/// Ranks from 1 on; equal values share the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let rank = |value: &f64| {
        let below = values.iter().filter(|other| other.total_cmp(value).is_lt()).count() as f64;
        let equal = values.iter().filter(|other| other.total_cmp(value).is_eq()).count() as f64;
        below + f64::midpoint(equal, 1.0)
    };
    values.iter().map(rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spearman_is_that_of_scipy() {
        // scipy.stats.spearmanr of scipy 1.16 on the same lists.
        let cases = [
            (vec![1.0, 2.0, 3.0, 4.0, 5.0], vec![5.0, 6.0, 7.0, 8.0, 7.0], 0.820_782_681_668_123_3),
            (vec![1.0, 2.0, 3.0], vec![3.0, 2.0, 1.0], -1.0),
            (vec![0.1, 7.0, 3.0, 3.0], vec![2.0, 9.0, 4.0, 5.0], 0.948_683_298_050_513_8),
        ];
        for (a, b, expected) in cases {
            assert!((spearman(&a, &b) - expected).abs() < 1e-12);
        }
        assert!(spearman(&[1.0, 1.0], &[1.0, 2.0]).abs() < 1e-12);
    }
}
