//! What an implementation rounds on the way, as numbers: the precision profiles
//! that one can declare.

use fixtures::Dtype;
use fixtures::exchange::Precision;

/// Squared unit roundoffs of what attention in one element type, by one
/// precision profile, rounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Roundoffs {
    /// Of what is in the element type in every profile: answers, attention
    /// weights and score gradients as factors of products, rotated and normed
    /// queries and keys.
    pub(super) element: f64,
    /// Of all other intermediate numbers.
    pub(super) stored: f64,
    /// Of sums, and of what is computed of them before it is stored.
    pub(super) sum: f64,
    /// Of both factors of a product together.
    pub(super) factors: f64,
    /// The square of half the distance of the smallest numbers of the element
    /// type, where a weight may be as small as that.
    pub(super) tiny: f64,
    /// By what the square of a tolerance is multiplied, for the oracle's own
    /// roundings.
    pub(super) of_oracle: f64,
}

impl Roundoffs {
    /// Those of a profile in an element type.
    pub(crate) fn of(dtype: Dtype, precision: Precision) -> Roundoffs {
        let square = |x: f64| x * x;
        let element = square(dtype.unit_roundoff());
        let sum = square(dtype.unit_roundoff().min(Dtype::F32.unit_roundoff()));
        Roundoffs {
            element,
            sum,
            stored: match precision {
                Precision::Stored => element,
                Precision::Fused | Precision::Tf32 => sum,
            },
            // 11 significant bits: NVIDIA, "NVIDIA A100 Tensor Core GPU
            // Architecture", 2020, p. 26, for TF32.
            factors: match (precision, dtype) {
                (Precision::Tf32, Dtype::F32) => 2.0 * square(2f64.powi(-11)),
                _ => 0.0,
            },
            tiny: square(dtype.smallest_roundoff()),
            of_oracle: if dtype == Dtype::F64 { 2.0 } else { 1.0 },
        }
    }

    /// One for each kind of rounding that these are of, in words, with the other
    /// roundings left out: what each moves adds up to what all move.
    pub(crate) fn parts(self) -> [(&'static str, f64, Roundoffs); 5] {
        let none = Roundoffs {
            element: 0.0,
            stored: 0.0,
            sum: 0.0,
            factors: 0.0,
            tiny: 0.0,
            ..self
        };
        let part = |words, square: f64, part| (words, square.sqrt(), part);
        let Roundoffs {
            element,
            stored,
            sum,
            factors,
            tiny,
            ..
        } = self;
        [
            part(
                "what is in the element type: answers, factors P and dS, partial sums",
                element,
                Roundoffs { element, ..none },
            ),
            part(
                "what the precision profile stores: scores, dP, dS",
                stored,
                Roundoffs { stored, ..none },
            ),
            part(
                "sums, exponentials and what is made of them",
                sum,
                Roundoffs { sum, ..none },
            ),
            part(
                "factors of products",
                factors,
                Roundoffs { factors, ..none },
            ),
            part(
                "the smallest numbers of the element type",
                tiny,
                Roundoffs { tiny, ..none },
            ),
        ]
    }
}
