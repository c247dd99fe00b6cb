//! Initial weights: a function of the seed, the parameter and the place in it.
//!
//! So every rank has the same, whatever the mesh, and no generator has a state.

use tch::Tensor;
use ulysses::{LlamaConfig, model::Weights};

/// Norms of one, and matrices of numbers spread evenly around zero, as far as
/// keeps the mean square of what they multiply, within a factor of two.
///
/// A number has 24 bits and its scale is a power of two: float32 holds it
/// exactly, and training begins with the same weights in both dtypes.
pub(crate) fn initial(config: &LlamaConfig, seed: u64) -> Result<Weights, tch::TchError> {
    let weights = config.parameters().into_iter().zip(0..);
    let weights = weights.map(|(parameter, number)| {
        let elements = parameter.shape.iter().product::<i64>() as u64;
        let values: Vec<f64> = match parameter.shape[..] {
            [_, from] => {
                let scale = (3.0 / from as f64).sqrt().log2().floor().exp2();
                let place = |element| mix(mix(mix(seed) ^ number) ^ element);
                let values = (0..elements).map(|element| scale * unit(place(element)));
                values.collect()
            }
            _ => vec![1.0; elements as usize],
        };
        let tensor = Tensor::f_from_slice(&values)?.f_view(&parameter.shape[..])?;
        Ok((parameter.name, tensor))
    });
    weights.collect()
}

/// splitmix64. Steele et al., "Fast splittable pseudorandom number generators",
/// OOPSLA 2014.
fn mix(word: u64) -> u64 {
    let mut z = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// From -1 to below 1.
fn unit(word: u64) -> f64 {
    (word >> 40) as f64 / f64::from(1 << 23) - 1.0
}
