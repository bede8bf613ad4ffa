/* raise.c: the only map from kvc_status to Python exceptions. */
#include "binding.h"

static PyObject *budget_error, *cuda_error;

PyObject *raise_text(kvc_status status, const char *text) {
    PyObject *type = PyExc_ValueError;
    switch (status) {
    case KVC_EDTYPE: type = PyExc_TypeError; break;
    case KVC_ENOMEM: type = PyExc_MemoryError; break;
    case KVC_ENOTSUP: type = PyExc_NotImplementedError; break;
    case KVC_ENODEV:
    case KVC_ECUDA: type = cuda_error; break;
    case KVC_EBUDGET: type = budget_error; break;
    default: break;
    }
    PyErr_SetString(type, text);
    return NULL;
}

PyObject *raise_status(kvc_status status) { return raise_text(status, kvc_last_error()); }

int raise_init(PyObject *module) {
    budget_error = PyErr_NewExceptionWithDoc(
        "kvcomp._C.BudgetError", "A byte budget below the smallest plan; `least_bytes` is what that one takes.",
        PyExc_ValueError, NULL);
    cuda_error = PyErr_NewExceptionWithDoc("kvcomp._C.CudaError", "CUDA is asked for and cannot be used, or failed.",
                                           PyExc_RuntimeError, NULL);
    if (!budget_error || !cuda_error) return -1;
    if (PyModule_AddObjectRef(module, "BudgetError", budget_error)) return -1;
    return PyModule_AddObjectRef(module, "CudaError", cuda_error);
}
