//! Max pooling and its gradient against float64 PyTorch; `tests/fixtures/README.md` says where the references come
//! from.

use crate::common::fixtures::{hash_uniform, number, read_json};
use crate::common::{assert_close, host_devices, upload};
use polder::kernels::layers::PoolShape;
use polder::kernels::max_pool::{max_pool, max_pool_backward};
use serde_json::Value;

#[test]
fn overlapping_and_padded_windows_match_pytorch() {
    let fixture = read_json("max_pool.json");
    let of = |value: &Value, key: &str| value[key].as_u64().unwrap() as usize;
    let [batch, height, width, channels] = ["batch", "height", "width", "channels"].map(|key| of(&fixture, key));
    let cases = fixture["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let [kernel, stride, padding] = ["kernel", "stride", "padding"].map(|key| of(case, key));
        let shape = PoolShape { batch, height, width, channels, kernel, stride, padding };
        let expected = |key: &str| case[key].as_array().unwrap().iter().map(number).collect::<Vec<f64>>();
        let hashed = |name: &str, len: usize| (0..len).map(|index| hash_uniform(name, index)).collect::<Vec<f64>>();
        for (name, device) in host_devices() {
            let x = upload::<f64>(&device, &hashed("max_pool:x", shape.input_len()));
            let dy = upload::<f64>(&device, &hashed("max_pool:dy", shape.output_len()));
            let mut y = device.poisoned::<f64>(shape.output_len()).unwrap();
            let mut dx = device.poisoned::<f64>(shape.input_len()).unwrap();
            let mut chosen = device.poisoned::<u8>(shape.output_len()).unwrap();
            max_pool(&shape, x.view(), y.view_mut(), chosen.view_mut()).unwrap();
            max_pool_backward(&shape, dy.view(), chosen.view(), dx.view_mut(), false).unwrap();
            let what = format!("{kernel}x{kernel}, stride {stride}, padding {padding} on {name}");
            assert_eq!(y.to_vec().unwrap(), expected("y"), "{what}");
            // An element may be the largest of several windows, whose gradients are added in another order.
            assert_close(&what, &dx.to_vec().unwrap(), &expected("dx"), 1e-15);
        }
    }
}
