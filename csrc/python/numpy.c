/* numpy.c: NumPy arrays through NumPy's C API (2.0 or newer, limited Python API). bfloat16 is ml_dtypes' type. */
#include "binding.h"

#define PY_ARRAY_UNIQUE_SYMBOL kvcomp_numpy_api
#include <numpy/arrayobject.h>

int numpy_import(void) { return PyArray_ImportNumPyAPI(); }

static int dtype_of(PyArrayObject *array) {
    switch (PyArray_TYPE(array)) {
    case NPY_FLOAT: return KVC_FLOAT32;
    case NPY_DOUBLE: return KVC_FLOAT64;
    case NPY_HALF: return KVC_FLOAT16;
    case NPY_UBYTE: return KVC_UINT8;
    case NPY_INT: return KVC_INT32;
    case NPY_UINT: return KVC_UINT32;
    case NPY_LONG:
    case NPY_LONGLONG: return KVC_INT64;
    case NPY_ULONG:
    case NPY_ULONGLONG: return KVC_UINT64;
    default: break;
    }
    int dtype = -1;
    PyObject *descr = PyObject_GetAttrString((PyObject *)array, "dtype");
    PyObject *name = descr ? PyObject_GetAttrString(descr, "name") : NULL;
    if (name && PyUnicode_CompareWithASCIIString(name, "bfloat16") == 0) dtype = KVC_BFLOAT16;
    Py_XDECREF(name);
    Py_XDECREF(descr);
    PyErr_Clear();
    return dtype;
}

int numpy_tensor(kvc_frame *frame, PyObject *object, const char *name, kvc_tensor *out) {
    if (!PyArray_Check(object)) return 1;
    PyArrayObject *array = (PyArrayObject *)object;
    const int dtype = dtype_of(array);
    if (dtype < 0) {
        PyErr_Format(PyExc_TypeError, "%s: %s: expected a plain float or integer array, got %S", frame->op, name,
                     (PyObject *)PyArray_DESCR(array));
        return -1;
    }
    if (PyArray_NDIM(array) > KVC_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s: %s: expected at most %d dimensions, got %d", frame->op, name, KVC_MAX_DIMS,
                     PyArray_NDIM(array));
        return -1;
    }
    if (!PyArray_ISALIGNED(array) || !PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(PyExc_ValueError, "%s: %s: expected aligned elements in native byte order", frame->op, name);
        return -1;
    }
    const npy_intp size = PyArray_ITEMSIZE(array);
    *out = (kvc_tensor){.data = PyArray_DATA(array),
                        .dtype = dtype,
                        .ndim = PyArray_NDIM(array),
                        .device = KVC_CPU,
                        .read_only = !PyArray_ISWRITEABLE(array)};
    for (int axis = 0; axis < out->ndim; axis++) {
        out->shape[axis] = PyArray_DIM(array, axis);
        if (PyArray_STRIDE(array, axis) % size != 0) {
            PyErr_Format(PyExc_ValueError, "%s: %s: expected strides that are multiples of the element size", frame->op,
                         name);
            return -1;
        }
        out->strides[axis] = PyArray_STRIDE(array, axis) / size;
    }
    return 0;
}

/* arena_type.c's results. */
PyObject *numpy_uint32(Py_ssize_t n, uint32_t **data) {
    npy_intp shape = n;
    PyObject *array = PyArray_SimpleNew(1, &shape, NPY_UINT32);
    if (array) *data = PyArray_DATA((PyArrayObject *)array);
    return array;
}
