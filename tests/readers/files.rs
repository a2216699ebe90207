//! Small files of data sets, written byte by byte, and pictures that Pillow has written.

use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};

/// A pixel of the images in these files, by its place in the file.
pub fn pixel(index: usize) -> u8 {
    (index * 7 % 251) as u8
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("a Vec takes all bytes");
    encoder.finish().expect("a Vec takes all bytes")
}

pub fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("a Vec takes all bytes");
    encoder.finish().expect("a Vec takes all bytes")
}

/// A short text of a pickle.
fn text(text: &str) -> Vec<u8> {
    [&[b'U', text.len() as u8], text.as_bytes()].concat()
}

/// A batch of CIFAR's Python version with these labels and as many images.
pub fn pickled_batch(labels_key: &str, labels: &[u8]) -> Vec<u8> {
    pickled_images(labels_key, labels, &(0..labels.len() * 3072).map(pixel).collect::<Vec<_>>())
}

/// A batch of CIFAR's Python version, as Python 2 has written them, with these labels and planes.
pub fn pickled_images(labels_key: &str, labels: &[u8], data: &[u8]) -> Vec<u8> {
    let rows = labels.len() as u16;
    let mut bytes = b"\x80\x02}q\x01(".to_vec();
    bytes.extend([text("batch_label"), b"q\x02".to_vec(), text("testing batch 1 of 1"), b"q\x03".to_vec()].concat());
    bytes.extend([text(labels_key), b"q\x04]q\x05(".to_vec()].concat());
    bytes.extend(labels.iter().flat_map(|&label| [b'K', label]));
    bytes.extend([b"e".to_vec(), text("data"), b"q\x06cnumpy.core.multiarray\n_reconstruct\nq\x07".to_vec()].concat());
    bytes.extend(b"cnumpy\nndarray\nq\x08K\x00\x85q\x09U\x01bq\x0a\x87q\x0bRq\x0c(K\x01M");
    bytes.extend(rows.to_le_bytes());
    bytes.extend(b"M\x00\x0c\x86q\x0dcnumpy\ndtype\nq\x0eU\x02u1q\x0fK\x00K\x01\x87q\x10Rq\x11(K\x03U\x01|q\x12NNN");
    bytes.extend(b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x13b\x89T");
    bytes.extend((data.len() as u32).to_le_bytes());
    bytes.extend(data);
    bytes.extend(b"q\x14tq\x15bu.");
    bytes
}

/// A tar archive of files.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, bytes) in files {
        let mut header = [0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", bytes.len()).as_bytes());
        header[148..156].fill(b' ');
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.extend(header);
        archive.extend_from_slice(bytes);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// An element of a MATLAB file.
fn element(kind: u32, bytes: &[u8]) -> Vec<u8> {
    let mut element = [kind.to_le_bytes(), (bytes.len() as u32).to_le_bytes()].concat();
    element.extend_from_slice(bytes);
    element.resize(element.len().next_multiple_of(8), 0);
    element
}

/// A variable of a MATLAB file with unsigned bytes in column-major order.
pub fn mat_variable(name: &str, sizes: &[u32], values: &[u8]) -> Vec<u8> {
    let sizes: Vec<u8> = sizes.iter().flat_map(|size| size.to_le_bytes()).collect();
    // A short name lies in its tag.
    let mut short = [1, 0, name.len() as u8, 0, 0, 0, 0, 0];
    short[4..4 + name.len()].copy_from_slice(name.as_bytes());
    let parts = [element(6, &[9, 0, 0, 0, 0, 0, 0, 0]), element(5, &sizes), short.to_vec(), element(2, values)];
    element(14, &parts.concat())
}

/// A MATLAB file of version 5 with these variables, each compressed.
pub fn mat(variables: &[Vec<u8>]) -> Vec<u8> {
    let mut file = b"MATLAB 5.0 MAT-file, Platform: GLNXA64".to_vec();
    file.resize(124, b' ');
    file.extend(b"\x00\x01IM");
    for variable in variables {
        let packed = zlib(variable);
        file.extend(15u32.to_le_bytes());
        file.extend((packed.len() as u32).to_le_bytes());
        file.extend(packed);
    }
    file
}

/// A file of SVHN with these labels and as many images.
pub fn svhn(labels: &[u8]) -> Vec<u8> {
    let count = labels.len() as u32;
    let pixels: Vec<u8> = (0..labels.len() * 3072).map(pixel).collect();
    mat(&[mat_variable("X", &[32, 32, 3, count], &pixels), mat_variable("y", &[count, 1], labels)])
}

/// A `.npy` file: version 1.0, C order.
pub fn npy(dtype: &str, sizes: &[usize], values: &[u8]) -> Vec<u8> {
    let sizes: String = sizes.iter().map(|size| format!("{size},")).collect();
    let mut header = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({sizes}), }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    [&b"\x93NUMPY\x01\x00"[..], &(header.len() as u16).to_le_bytes(), header.as_bytes(), values].concat()
}

/// A picture as PNG, in colour, with eight bits a channel.
pub fn png(width: u32, height: u32, pixels: &[u8]) -> Vec<u8> {
    let chunk = |kind: &[u8; 4], data: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(kind);
        crc.update(data);
        [&(data.len() as u32).to_be_bytes()[..], kind, data, &crc.sum().to_be_bytes()].concat()
    };
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    // A byte before each row says that it is not filtered.
    let rows: Vec<u8> = pixels.chunks(3 * width as usize).flat_map(|row| [&[0], row].concat()).collect();
    let start = b"\x89PNG\r\n\x1a\n".to_vec();
    [start, chunk(b"IHDR", &header), chunk(b"IDAT", &zlib(&rows)), chunk(b"IEND", &[])].concat()
}

/// The pictures of 6x5 pixels in `fixtures/formats/`.
pub const PICTURES: [&str; 4] = ["baseline.jpg", "progressive.jpg", "lossy.webp", "lossless.webp"];

/// One of [`PICTURES`].
pub fn picture(name: &str) -> Vec<u8> {
    // The fuzz targets are a crate of their own, in a folder of the repository.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let repository = if root.join("tests").is_dir() { root } else { root.parent().unwrap_or(root) };
    std::fs::read(repository.join("tests/fixtures/formats").join(name)).expect("a file of the repository")
}
