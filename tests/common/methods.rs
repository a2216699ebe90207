//! The methods as values that tests can copy, compare and take apart.

use polder::arena::Matrix;
use polder::device::Scalar;
use polder::optim::{
    Asam, Base, CrSam, FriendlySam, Gam, Gnr, Gsam, LookSam, Method, Msam, Plain, RSam, RandomSam, SaSam, Sam, Sampa,
    Sassha, Settings, Wsam,
};

macro_rules! any_method {
    ($($name:ident),+ $(,)?) => {
        /// Any of the library's methods with its settings.
        #[derive(Debug, Clone, Copy, PartialEq)]
        pub enum AnyMethod {
            $($name($name)),+
        }

        impl AnyMethod {
            pub fn boxed<T: Scalar>(self) -> Box<dyn Method<T>> {
                match self {
                    $(Self::$name(method) => Box::new(method)),+
                }
            }
        }

        $(impl From<$name> for AnyMethod {
            fn from(method: $name) -> Self {
                Self::$name(method)
            }
        })+
    };
}

any_method!(
    Plain,
    Sam,
    Asam,
    RandomSam,
    RSam,
    Gsam,
    LookSam,
    FriendlySam,
    Msam,
    Wsam,
    CrSam,
    Gnr,
    Gam,
    SaSam,
    Sassha,
    Sampa
);

impl AnyMethod {
    pub const PLAIN: Self = Self::Plain(Plain {});

    /// SAM as usual.
    pub fn sam(rho: f64) -> Self {
        Sam::new(rho).into()
    }

    /// An optimizer's settings, without weight decay and clipping. The first two weights are a matrix for Muon.
    pub fn over<T: Scalar>(self, base: Base) -> Settings<T> {
        let matrices = vec![Matrix { offset: 0, rows: 1, columns: 2 }];
        Settings { matrices, ..Settings::boxed(self.boxed(), base) }
    }
}
