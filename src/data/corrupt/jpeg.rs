//! JPEG compression, without the coding of the coefficients, which loses nothing: colours at half the resolution, a
//! discrete cosine transform of blocks, and coefficients rounded to multiples. Tables and rounding are libjpeg's.

use super::draws::Draws;
use super::{CHANNELS, SIDE};

const BLOCK: usize = 8;
/// Rows, and columns, of the colours.
const HALF: usize = SIDE / 2;

/// Annex K's table for brightness, row by row.
#[rustfmt::skip]
const LUMINANCE: [i32; 64] = [
    16, 11, 10, 16, 24, 40, 51, 61,
    12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77,
    24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
];

/// Its table for colour: this corner; 99 elsewhere.
const CHROMINANCE: [[i32; 4]; 4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]];

pub fn compression(image: &[u8], severity: usize, _: &mut Draws) -> Vec<u8> {
    let quality = [80, 65, 58, 50, 40][severity];
    let scale = if quality < 50 { 5000 / quality } else { 200 - 2 * quality };
    let table = |entry: &dyn Fn(usize, usize) -> i32| -> Vec<i32> {
        let scaled = |e: usize| ((entry(e / BLOCK, e % BLOCK) * scale + 50) / 100).clamp(1, 255);
        (0..BLOCK * BLOCK).map(scaled).collect()
    };
    let brightness = table(&|i, j| LUMINANCE[i * BLOCK + j]);
    let colour = table(&|i, j| if i < 4 && j < 4 { CHROMINANCE[i][j] } else { 99 });
    let [luma, blue, red] = to_ycc(image);
    let luma = through_blocks(&luma, SIDE, &brightness);
    let [blue, red] = [blue, red].map(|plane| enlarged(&through_blocks(&halved(&plane), HALF, &colour)));
    to_rgb(&luma, &blue, &red)
}

/// Brightness and two colours, each from 0 to 255.
fn to_ycc(image: &[u8]) -> [Vec<u8>; 3] {
    let fixed = |x: f64| (x * 65536.0 + 0.5) as i64;
    let plane = |weights: [i64; 3], offset: i64| {
        let value = |pixel: &[u8]| {
            let sum: i64 = pixel.iter().zip(weights).map(|(&byte, weight)| i64::from(byte) * weight).sum();
            ((sum + offset) >> 16) as u8
        };
        image.chunks_exact(CHANNELS).map(value).collect()
    };
    let centre = (128 << 16) + (1 << 15) - 1;
    [
        plane([fixed(0.299), fixed(0.587), fixed(0.114)], 1 << 15),
        plane([-fixed(0.168735892), -fixed(0.331264108), fixed(0.5)], centre),
        plane([fixed(0.5), -fixed(0.418687589), -fixed(0.081312411)], centre),
    ]
}

fn to_rgb(luma: &[u8], blue: &[u8], red: &[u8]) -> Vec<u8> {
    let fixed = |x: f64| (x * 65536.0 + 0.5) as i64;
    let colour = |((&y, &b), &r): ((&u8, &u8), &u8)| {
        let (y, b, r) = (i64::from(y), i64::from(b) - 128, i64::from(r) - 128);
        let half = 1 << 15;
        [
            y + ((fixed(1.402) * r + half) >> 16),
            y + ((-fixed(0.344136286) * b - fixed(0.714136286) * r + half) >> 16),
            y + ((fixed(1.772) * b + half) >> 16),
        ]
        .map(|value| value.clamp(0, 255) as u8)
    };
    luma.iter().zip(blue).zip(red).flat_map(colour).collect()
}

/// Means of 2 × 2 values, rounded down and up in turns.
fn halved(plane: &[u8]) -> Vec<u8> {
    let at = |i: usize, j: usize| u32::from(plane[i * SIDE + j]);
    let mean = |e: usize| {
        let (i, j) = (2 * (e / HALF), 2 * (e % HALF));
        let sum = at(i, j) + at(i, j + 1) + at(i + 1, j) + at(i + 1, j + 1);
        ((sum + 1 + (e % HALF % 2) as u32) >> 2) as u8
    };
    (0..HALF * HALF).map(mean).collect()
}

/// Twice the rows and columns. Each value weighs its nearest neighbours 9, 3, 3 and 1; the edge is repeated.
fn enlarged(plane: &[u8]) -> Vec<u8> {
    let mut out = vec![0; SIDE * SIDE];
    for i in 0..SIDE {
        let near = i / 2;
        let far = if i % 2 == 0 { near.saturating_sub(1) } else { (near + 1).min(HALF - 1) };
        let sum = |j: usize| 3 * i32::from(plane[near * HALF + j]) + i32::from(plane[far * HALF + j]);
        for j in 0..SIDE {
            let near = j / 2;
            let value = match j {
                0 => (4 * sum(0) + 8) >> 4,
                j if j == SIDE - 1 => (4 * sum(near) + 7) >> 4,
                j if j % 2 == 0 => (3 * sum(near) + sum(near - 1) + 8) >> 4,
                _ => (3 * sum(near) + sum(near + 1) + 7) >> 4,
            };
            out[i * SIDE + j] = value as u8;
        }
    }
    out
}

/// Each block of a plane of `side` columns, with its coefficients rounded to multiples of the table's.
fn through_blocks(plane: &[u8], side: usize, table: &[i32]) -> Vec<u8> {
    let mut out = vec![0; plane.len()];
    for corner in 0..(side / BLOCK).pow(2) {
        let (top, left) = (corner / (side / BLOCK) * BLOCK, corner % (side / BLOCK) * BLOCK);
        let place = |e: usize| (top + e / BLOCK) * side + left + e % BLOCK;
        let mut block: Block = std::array::from_fn(|e| i32::from(plane[place(e)]) - 128);
        // Coefficients are eight times as large as the multiples.
        block = along_columns(along_rows(block, forward, BITS - EXTRA_BITS), forward, BITS + EXTRA_BITS);
        for (value, &step) in block.iter_mut().zip(table) {
            *value = value.signum() * ((value.abs() + 4 * step) / (8 * step)) * step;
        }
        block = along_rows(along_columns(block, backward, BITS - EXTRA_BITS), backward, BITS + EXTRA_BITS + 3);
        for (e, value) in block.iter().enumerate() {
            out[place(e)] = (value + 128).clamp(0, 255) as u8;
        }
    }
    out
}

type Block = [i32; BLOCK * BLOCK];
type Line = [i32; BLOCK];

/// Bits behind the point of the factors below, and those that the first of two passes keeps.
const BITS: u32 = 13;
const EXTRA_BITS: u32 = 2;

/// A transform of each row, without so many of its lowest bits.
fn along_rows(block: Block, transform: fn(Line) -> Line, bits: u32) -> Block {
    let mut out = block;
    for row in out.chunks_exact_mut(BLOCK) {
        let line = transform(std::array::from_fn(|k| row[k]));
        row.copy_from_slice(&line.map(|value| (value + (1 << (bits - 1))) >> bits));
    }
    out
}

/// Likewise of each column.
fn along_columns(block: Block, transform: fn(Line) -> Line, bits: u32) -> Block {
    let turned = |block: Block| -> Block { std::array::from_fn(|e| block[e % BLOCK * BLOCK + e / BLOCK]) };
    turned(along_rows(turned(block), transform, bits))
}

/// The odd half of both transforms (Loeffler, Ligtenberg and Moschytz 1989), from four values to four.
fn odd_half([a, b, c, d]: [i32; 4]) -> [i32; 4] {
    let all = (a + c + b + d) * 9633;
    let (outer, inner) = ((a + d) * -7373, (b + c) * -20995);
    let (even, odd) = ((a + c) * -16069 + all, (b + d) * -3196 + all);
    [a * 2446 + outer + even, b * 16819 + inner + odd, c * 25172 + inner + even, d * 12299 + outer + odd]
}

/// The cosine transform of a line, times 2^13 and the square root of 8.
fn forward(x: Line) -> Line {
    let sum = |k: usize| x[k] + x[7 - k];
    let (outer, inner) = (sum(0) + sum(3), sum(1) + sum(2));
    let (d, c) = (sum(0) - sum(3), sum(1) - sum(2));
    let shared = (c + d) * 4433;
    let [y7, y5, y3, y1] = odd_half([x[3] - x[4], x[2] - x[5], x[1] - x[6], x[0] - x[7]]);
    let (y2, y6) = (shared + d * 6270, shared - c * 15137);
    [(outer + inner) << BITS, y1, y2, y3, (outer - inner) << BITS, y5, y6, y7]
}

/// Its inverse, times the same.
fn backward(y: Line) -> Line {
    let shared = (y[2] + y[6]) * 4433;
    let (c, d) = (shared - y[6] * 15137, shared + y[2] * 6270);
    let (sum, difference) = ((y[0] + y[4]) << BITS, (y[0] - y[4]) << BITS);
    let even = [sum + d, difference + c, difference - c, sum - d];
    let [o3, o2, o1, o0] = odd_half([y[7], y[5], y[3], y[1]]);
    let odd = [o0, o1, o2, o3];
    std::array::from_fn(|k| if k < 4 { even[k] + odd[k] } else { even[7 - k] - odd[7 - k] })
}
